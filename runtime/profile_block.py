"""Runs the kernels of one stage on made-up tensors, and times them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..compiler.ir.graph import Mode
from ..compiler.ir.program import StageProgram
from .clock import busy_clock
from .cuda_graphs import GraphSlots
from .kernels import Kernel, Source, StageKernels, trace_inference, trace_training
from .made_up import index_limits, made_up
from .stand_in import StandIns, filled

__all__ = ["BlockRun", "block_kernels"]

T = TypeVar("T")
_WARM = 3  # runs before those that count: CUDA graphs are recorded in the second
_LEAST, _MOST = 5, 40  # runs that count
_ENOUGH_SECONDS = 0.15  # of runs that count
_LONG_SECONDS = 2.0


def block_kernels(
    function: Callable[..., Any], stage: StageProgram, device: torch.device, compile: bool
) -> StageKernels:
    """The kernels of `stage` as a rank derives them, without the other ranks of its mesh."""
    collectives = StandIns(stage)
    if stage.graph.mode is Mode.INFER:
        if compile and not stage.meets:
            function = torch.compile(function, dynamic=False)
        kernels = trace_inference(function, stage.graph, device, collectives)
        return kernels.compiled() if compile and stage.meets else kernels
    kernels = trace_training(function, stage.graph, device, collectives)
    return kernels.compiled() if compile else kernels


class _Set:
    """The tensors of one copy of the block, and what backward still needs."""

    def __init__(self, stage: StageProgram, kernels: StageKernels, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        signature, values = kernels.signature, stage.graph.values
        limits = index_limits([stage.graph])
        self.arguments = [made_up(v, generator, limits).to(device) for v in signature.arguments]
        self.gradients = {i: torch.zeros_like(self.arguments[i]) for i in signature.trained}
        outputs = [values[stage.graph.outputs[place].value] for place in signature.tangents]
        self.tangents = [filled(v.type.shape, v.type.dtype, device) for v in outputs]
        self.kept: dict[tuple[Source, int], Tensor | None] = {}
        self.slot: Any = None


class BlockRun:
    """Forward of all copies in turn, then input gradients and weight gradients, last copy first.

    Of CUDA graphs the replays alone count: what goes into a graph and comes out of it is copied at
    the ends of a stage, not between its blocks.

    Args:
        copies: of tensors.
        cuda_graphs: replay kernels as CUDA graphs (on CUDA devices only).
    """

    def __init__(
        self,
        stage: StageProgram,
        kernels: StageKernels,
        device: torch.device,
        copies: int,
        cuda_graphs: bool,
    ) -> None:
        self._kernels = kernels
        self._on_host = device.type == "cpu"
        self._clock = busy_clock(device)
        self._key = torch.zeros((), dtype=torch.int64, device=device)
        self._sets = [_Set(stage, kernels, device) for _ in range(copies)]
        parts = [kernels.input_sources, *(part.sources for part in kernels.backward_weights)]
        self._read = [frozenset(sources) for sources in parts]
        self._resting = 0.0
        self._slots = None
        if cuda_graphs and device.type == "cuda" and kernels.is_capturable:
            self._slots = GraphSlots(kernels, in_flight=copies)

    def typical_seconds(self) -> tuple[float, float, float]:
        """Of F, B and W of one copy: on CPUs the mean, as a step pays for every delay; on CUDA,
        where there are hardly any but those of measuring, the median."""
        columns = zip(*self.runs(_ENOUGH_SECONDS), strict=True)
        first, second, third = (
            statistics.fmean(found) if self._on_host else statistics.median(found)
            for found in columns
        )
        return first, second, third

    def runs(self, seconds: float, *, resting: float = 0.0) -> list[tuple[float, float, float]]:
        """Seconds of F, B and W of one copy, run by run.

        Args:
            seconds: of runs that count.
            resting: how long a CPU worker rests after each phase, of the time that it took.
        """
        self._resting = resting if self._on_host else 0.0
        for _ in range(_WARM):
            self.seconds()
        began = time.perf_counter()
        rows: list[tuple[float, float, float]] = []
        while len(rows) < _MOST:
            rows.append(self.seconds())
            spent = time.perf_counter() - began
            if (len(rows) >= _LEAST and spent > seconds) or spent > _LONG_SECONDS:
                break
        return rows

    def seconds(self) -> tuple[float, float, float]:
        """One run."""
        replays = [self._slots.replays(own.slot) for own in self._sets] if self._slots else [{}]
        if all(replays):
            return self._replayed(replays)
        phases = [self._timed(self._forward, self._sets), 0.0, 0.0]
        if self._kernels.backward_input is not None:
            phases[1] = self._timed(self._backward_input, self._sets[::-1])
            phases[2] = self._timed(self._backward_weight, self._sets[::-1])
        first, second, third = phases
        return first, second, third

    def _replayed(self, sets: list[dict[str, Callable[[], None]]]) -> tuple[float, float, float]:
        weights = [part.name for part in self._kernels.backward_weights]

        def seconds(names: list[str], own: list[dict[str, Callable[[], None]]]) -> float:
            kernels = [item[name] for item in own for name in names if name in item]
            return self._timed(lambda replay: replay(), kernels) * len(kernels) / len(own)

        return (
            seconds(["forward"], sets),
            seconds(["input"], sets[::-1]),
            seconds(weights, sets[::-1]),
        )

    def _timed(self, phase: Callable[[T], None], items: Sequence[T]) -> float:
        """Seconds of one item."""
        begin = self._clock()
        for item in items:
            phase(item)
        seconds = self._clock() - begin
        if self._resting:
            time.sleep(self._resting * seconds)
        return seconds / max(1, len(items))

    def _forward(self, own: _Set) -> None:
        arguments: list[Tensor | None] = [self._key, *own.arguments]
        needed = frozenset().union(*self._read)

        def keep(staged: list[Tensor | None]) -> None:
            for kind, index in needed:
                if kind is Source.ARGUMENT:
                    own.kept[kind, index] = staged[index]

        if self._slots is None:
            keep(arguments)
            results = list(self._kernels.forward(arguments))
        else:
            results, own.slot = self._slots.forward(arguments, keep)
        for index, tensor in enumerate(results[self._kernels.num_outputs :]):
            own.kept[Source.SAVED, index] = tensor
        if self._kernels.backward_input is None and self._slots is not None:
            self._slots.release(own.slot)

    def _backward_input(self, own: _Set) -> None:
        kernels = self._kernels
        assert kernels.backward_input is not None
        for index, tangent in enumerate(own.tangents):
            own.kept[Source.TANGENT, index] = tangent
        arguments = self._taken(own, kernels.input_sources, 1)
        arguments += [own.gradients[position] for position in kernels.accumulated_early]
        results = self._call(own, "input", kernels.backward_input, arguments)
        for index, tensor in enumerate(results[kernels.num_gradients :]):
            own.kept[Source.PASSED, index] = tensor

    def _backward_weight(self, own: _Set) -> None:
        for number, part in enumerate(self._kernels.backward_weights, 2):
            arguments = self._taken(own, part.sources, number)
            arguments += [own.gradients[position] for position in part.accumulated]
            results = self._call(own, part.name, part.kernel, arguments)
            for index, tensor in zip(part.passed, results, strict=True):
                own.kept[Source.PASSED, index] = tensor
        own.kept.clear()

    def _taken(
        self, own: _Set, sources: tuple[tuple[Source, int], ...], number: int
    ) -> list[Tensor | None]:
        """What a kernel reads; of what no kernel from `number` on reads, nothing is kept."""
        later = frozenset().union(*self._read[number:])
        return [own.kept[item] if item in later else own.kept.pop(item) for item in sources]

    def _call(
        self, own: _Set, name: str, kernel: Kernel, arguments: list[Tensor | None]
    ) -> list[Tensor | None]:
        if self._slots is None:
            return list(kernel(arguments))
        return self._slots.backward(own.slot, name, kernel, arguments)
