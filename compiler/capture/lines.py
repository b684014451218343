"""Which of the user's lines issued each call of a trace, and a trace without what nobody reads.

Torch can record the whole stack of every call, and write Python code for every graph on the way to
the last one: that takes two fifths of the time of an export, and one line a call is all we need.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch.fx.config
from torch import fx
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.overrides import TorchFunctionMode

from .locate import is_internal

__all__ = ["Lines", "lean_traces"]


class Lines(TorchFunctionMode):
    """Gives the nodes that a traced call makes the line of the innermost `forward` of the user's,
    where torch does not give them a whole stack."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        graph = _graph()
        last = None if graph is None else next(iter(reversed(graph.nodes)), None)
        result = func(*args, **(kwargs or {}))
        if graph is not None:
            _mark(graph, last)
        return result


def _graph() -> fx.Graph | None:
    """The graph that is being traced."""
    mode: Any = get_proxy_mode()
    return getattr(getattr(mode, "tracer", None), "graph", None)


def _mark(graph: fx.Graph, last: fx.Node | None) -> None:
    """Give the nodes after `last` the line that is running."""
    place = ""
    for node in reversed(graph.nodes):
        if node is last:
            return
        place = place or _place()
        if not node.stack_trace:
            node.stack_trace = place


def _place() -> str:
    """In the form of Python's own stack traces."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        code = frame.f_code
        if code.co_name == "forward" and not is_internal(code.co_filename):
            return f'File "{code.co_filename}", line {frame.f_lineno}, in forward'
    return ""


@contextlib.contextmanager
def lean_traces() -> Iterator[None]:
    """While active, torch records no stacks, and writes code of a graph when that is run."""
    before = getattr(torch.fx.config, "do_not_emit_stack_traces", False)
    torch.fx.config.do_not_emit_stack_traces = True
    try:
        with _code_when_run():
            yield
    finally:
        torch.fx.config.do_not_emit_stack_traces = before


def _code_when_run() -> contextlib.AbstractContextManager[None]:
    """What torch's own compiler does; without it a trace is the same and takes longer."""
    try:
        from torch.fx._lazy_graph_module import _use_lazy_graph_module
    except ImportError:
        return contextlib.nullcontext()
    return _use_lazy_graph_module(True)
