"""The fallback of capture: a symbolic trace of the model, to be exported in its place.

`torch.fx.symbolic_trace` runs the model's Python on proxies. It sees neither gradient mode nor
autocast, so a model that switches them is refused here instead of being traced wrongly.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..ir.errors import CaptureError

__all__ = ["trace_symbolically"]


class _Tracer(fx.Tracer):
    def create_proxy(self, *args: Any, **kwargs: Any) -> fx.Proxy:
        if torch.is_grad_enabled() != self._grad_enabled or torch.is_autocast_enabled("cpu"):
            raise CaptureError(
                "the model switches gradients or autocast on or off, which torch.export did not "
                "get through and symbolic tracing would not see",
                ways_out=("make the model exportable by torch.export",),
            )
        return super().create_proxy(*args, **kwargs)

    def trace(self, *args: Any, **kwargs: Any) -> fx.Graph:
        self._grad_enabled = torch.is_grad_enabled()
        return super().trace(*args, **kwargs)


def trace_symbolically(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> fx.GraphModule:
    """A graph module that computes what `model` does on calls of this form.

    Inputs that are no tensors are fixed. Whatever the tracer raises passes through.
    """
    bound = inspect.signature(model.forward).bind(*args, **kwargs)
    bound.apply_defaults()
    fixed = {
        name: value
        for name, value in bound.arguments.items()
        if not isinstance(value, Tensor) and not _holds_tensors(value)
    }
    graph = _Tracer().trace(model, concrete_args=fixed)
    return fx.GraphModule(model, graph, type(model).__name__)


def _holds_tensors(value: object) -> bool:
    leaves = torch.utils._pytree.tree_leaves(value)
    return any(isinstance(leaf, Tensor) for leaf in leaves)
