"""Runs the operators of a graph one after the other on made-up tensors, and times each.

On the CPU an operator takes what the thread that calls it works. On CUDA the host must not wait
after every operator, as in a step it does not: events between them tell how far the device has
come. Stages are replayed as CUDA graphs, where small operators take a fraction of what they take
one by one, and so is a run here, with the events in it. Events take time themselves: runs without
any alternate with those that have them, and the operators share what such a run takes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..compiler.ir.graph import ValueKind
from ..compiler.ir.program import StageProgram
from .made_up import index_limits, made_up

__all__ = ["NodeRun"]

_LEAST_RUNS = 5
_WARM = 2  # runs before a CUDA graph is recorded: libraries choose their kernels

Nodes = Callable[[Callable[[], None], Callable[[], None]], None]  # `NodeRun.run`


class NodeRun:
    """All operators of some stages, ready to run.

    Args:
        stages: of one node each, in an order in which they run; what none of them computes is made
            up.
        functions: theirs, by name.
        cuda_graphs: record them as a CUDA graph (on a CUDA device).
    """

    def __init__(
        self,
        stages: Sequence[StageProgram],
        functions: dict[str, Callable[..., tuple[Tensor, ...]]],
        device: torch.device,
        cuda_graphs: bool,
    ) -> None:
        self._device = device
        self._cuda_graphs = cuda_graphs
        self._key = torch.zeros((), dtype=torch.int64, device=device)
        self._steps = [(stage, functions[f"stage_{stage.index}"]) for stage in stages]
        self._given = _made_up(stages, device)
        self._dead = _dead(stages)
        self.current = ""  # the operator that runs

    def repeated(self, seconds: float) -> tuple[list[list[float]], list[float]]:
        """Of runs for so many seconds, after some that do not count, the times of the nodes, and of
        the whole by the wall clock."""
        watch = self._watch()
        watch.nodes()
        rows: list[list[float]] = []
        wholes: list[float] = []
        began = time.perf_counter()
        while len(rows) < _LEAST_RUNS or time.perf_counter() - began < seconds:
            whole, row = watch.nodes()
            rows.append(row)
            wholes.append(whole)
        return rows, wholes

    def _watch(self) -> _Watch:
        if self._device.type == "cuda":
            return _DeviceWatch(self.run, len(self._steps), self._device, self._cuda_graphs)
        return _ThreadWatch(self.run)

    def run(self, begin: Callable[[], None], end: Callable[[], None]) -> None:
        """One run, with calls before and after every operator."""
        made: dict[str, Tensor] = {}
        with torch.no_grad():
            for (stage, function), dead in zip(self._steps, self._dead, strict=True):
                graph = stage.graph
                self.current = graph.nodes[0].name
                arguments = [
                    self._given[value.name] if value.name in self._given else made[value.name]
                    for value in graph.values
                    if value.kind is not ValueKind.RESULT
                ]
                begin()
                results = function(self._key, self._device, *arguments)
                end()
                for output, tensor in zip(graph.outputs, results, strict=True):
                    made[graph.values[output.value].name] = tensor
                del arguments, results
                for name in dead:
                    made.pop(name, None)


def _made_up(stages: Sequence[StageProgram], device: torch.device) -> dict[str, Tensor]:
    """What no stage computes, by name."""
    results = {
        stage.graph.values[output.value].name for stage in stages for output in stage.graph.outputs
    }
    limits = index_limits([stage.graph for stage in stages])
    generator = torch.Generator().manual_seed(0)
    given: dict[str, Tensor] = {}
    for value in (value for stage in stages for value in stage.graph.values):
        comes = value.kind is ValueKind.BOUNDARY and value.name in results
        if not (comes or value.kind is ValueKind.RESULT or value.name in given):
            given[value.name] = made_up(value, generator, limits).to(device)
    return given


def _dead(stages: Sequence[StageProgram]) -> list[list[str]]:
    """After each stage, what no later one reads."""
    last = {
        value.name: place
        for place, stage in enumerate(stages)
        for value in stage.graph.values_of(ValueKind.BOUNDARY)
    }
    dead: list[list[str]] = [[] for _ in stages]
    for name, place in last.items():
        dead[place].append(name)
    return dead


class _Watch(Protocol):
    def nodes(self) -> tuple[float, list[float]]:
        """Seconds of a run, by the wall clock, and of its operators."""
        ...


class _ThreadWatch:
    """By the time that the calling thread works: see `busy_clock`."""

    def __init__(self, run: Nodes) -> None:
        self._run = run

    def nodes(self) -> tuple[float, list[float]]:
        begins: list[float] = []
        ends: list[float] = []
        began = time.perf_counter()
        self._run(
            lambda: begins.append(time.thread_time()), lambda: ends.append(time.thread_time())
        )
        whole = time.perf_counter() - began
        return whole, [end - begin for begin, end in zip(begins, ends, strict=True)]


class _DeviceWatch:
    """By events in the stream of a CUDA device."""

    def __init__(self, run: Nodes, count: int, device: torch.device, cuda_graphs: bool) -> None:
        self._device = device
        for _ in range(_WARM):
            run(_nothing, _nothing)
        self._plain: Callable[[], None] = lambda: run(_nothing, _nothing)
        self._marked: Callable[[], None] = lambda: self._run_marked(run)
        graph = _recorded(self._plain, device) if cuda_graphs and count else None
        # such events are nodes of the graph: they can be read after each replay
        kind = {"external": True} if graph is not None else {}
        self._events = [torch.cuda.Event(enable_timing=True, **kind) for _ in range(count + 1)]
        if graph is not None:
            self._plain = graph
            self._marked = _recorded(self._marked, device) or self._marked

    def _run_marked(self, run: Nodes) -> None:
        ends = iter(self._events)
        next(ends).record()
        run(_nothing, lambda: next(ends).record())

    def nodes(self) -> tuple[float, list[float]]:
        self._whole(self._marked)
        pairs = zip(self._events, self._events[1:], strict=False)
        row = [begin.elapsed_time(end) / 1e3 for begin, end in pairs]
        whole = self._whole(self._plain)
        scale = whole / sum(row) if sum(row) > 0.0 else 1.0
        return whole, [seconds * scale for seconds in row]

    def _whole(self, run: Callable[[], None]) -> float:
        torch.cuda.synchronize(self._device)
        began = time.perf_counter()
        run()
        torch.cuda.current_stream(self._device).synchronize()
        return time.perf_counter() - began


def _nothing() -> None:
    pass


def _recorded(run: Callable[[], None], device: torch.device) -> Callable[[], None] | None:
    """What replays `run`; None if it cannot be recorded, as stages that wait for the device."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            run()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        torch.cuda.synchronize(device)
        return None
    return graph.replay
