"""Replay a stage's kernels as CUDA graphs.

A CUDA graph reads and writes fixed addresses, while a pipeline keeps several microbatches in
flight. So each stage owns *slots*: a slot holds static tensors and graphs of F, B and the parts of
W for one microbatch in flight, and is reused when that microbatch's W is done. A slot runs eagerly
on its first use (which warms libraries up), is captured on its second, and replayed from then on.
Ranks in processes of their own do the first two before the first step (`Executor.rehearse`).

Graphs of one slot share a memory pool. What F saves lives until the backward of its microbatch, so
slots do not share the pool of their F: a replay of one would overwrite what another keeps. B and W
do share one where the W of a microbatch follows its B at once: nothing of them outlives W but the
gradients of inputs. What only later graphs of its slot read is not held here: they have recorded
its address.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..compiler.ir.graph import ValueKind
from .kernels import Kernel, Source, StageKernels

__all__ = ["GraphSlots"]

_PERSISTENT = (ValueKind.PARAMETER, ValueKind.CONSTANT)


class _GraphedKernel:
    """One kernel on static inputs.

    Args:
        dynamic: positions of inputs that change address.
        steady: those of them that seldom change: they are copied when they have.
        kept: how many of its results it gives at every call; None: all. The others it gives at the
            first alone, None afterwards.
    """

    def __init__(
        self,
        kernel: Kernel,
        dynamic: frozenset[int],
        pool: Any,
        *,
        kept: int | None = None,
        steady: frozenset[int] = frozenset(),
    ) -> None:
        self._kernel = kernel
        self._dynamic = dynamic
        self._steady = steady
        self._copied: dict[int, tuple[Tensor, int]] = {}  # of steady ones, and their version then
        self._pool = pool
        self._kept = kept
        self._graph: torch.cuda.CUDAGraph | None = None
        self._static: list[Tensor | None] = []
        self._results: Sequence[Tensor | None] = ()

    def stage(self, arguments: list[Tensor | None]) -> list[Tensor | None]:
        """Static tensors with the content of `arguments`."""
        if not self._static:
            self._static = [
                tensor.clone() if tensor is not None and position in self._dynamic else tensor
                for position, tensor in enumerate(arguments)
            ]
        else:
            for position in self._dynamic:
                static, tensor = self._static[position], arguments[position]
                if static is None or tensor is None or self._is_copied(position, tensor):
                    continue
                static.copy_(tensor)
                if position in self._steady:
                    self._copied[position] = tensor, tensor._version
        return list(self._static)

    def _is_copied(self, position: int, tensor: Tensor) -> bool:
        source, version = self._copied.get(position, (None, -1))
        return source is tensor and version == tensor._version

    def replay(self) -> None:
        """Once more, on the inputs of the last call."""
        assert self._graph is not None
        self._graph.replay()

    def __call__(self) -> Sequence[Tensor | None]:
        if self._graph is None:
            self._graph = self._capture()
        self._graph.replay()
        results = self._results
        if self._kept is not None:
            self._results = [*results[: self._kept], *[None] * len(results[self._kept :])]
            self._static = [
                tensor if position in self._dynamic else None
                for position, tensor in enumerate(self._static)
            ]
        return results

    def _capture(self) -> torch.cuda.CUDAGraph:
        """Record the kernel on its static inputs.

        Unlike `torch.cuda.graph` this does not wait for the device: a receive that is under way
        there may need what this rank is about to compute.
        """
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(torch.cuda.graph(graph).capture_stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                self._results = self._kernel(list(self._static))
            finally:
                graph.capture_end()
        return graph


class _Slot:
    """Graphs of one microbatch in flight."""

    def __init__(self, kernels: StageKernels, backward_pool: Any) -> None:
        pool = torch.cuda.graph_pool_handle()
        arguments = kernels.signature.arguments
        dynamic = {0} | {
            position + 1
            for position, value in enumerate(arguments)
            if value.kind not in _PERSISTENT
        }
        buffers = {
            position + 1
            for position, value in enumerate(arguments)
            if value.kind is ValueKind.BUFFER
        }
        self.uses = 0
        self.forward = _GraphedKernel(
            kernels.forward, frozenset(dynamic), pool, steady=frozenset(buffers)
        )
        self.backward: dict[str, _GraphedKernel] = {}
        if kernels.backward_input is not None:
            self.backward["input"] = _GraphedKernel(
                kernels.backward_input,
                _tangents(kernels.input_sources),
                backward_pool or pool,
                kept=kernels.num_gradients,
            )
        for part in kernels.backward_weights:
            self.backward[part.name] = _GraphedKernel(
                part.kernel, _tangents(part.sources), backward_pool or pool, kept=0
            )


def _tangents(sources: Sequence[tuple[Source, int]]) -> frozenset[int]:
    return frozenset(i for i, (kind, _) in enumerate(sources) if kind is Source.TANGENT)


class GraphSlots:
    """Runs a stage's kernels through slots; falls back to plain kernels with a warning.

    `forward` returns the slot used, to be given to the backward calls of the same microbatch.

    Args:
        kernels: of the stage.
        in_flight: microbatches that are, at most, between their F and their W.
        weights_follow: no other backward of the stage comes between B and W of a microbatch.
    """

    def __init__(
        self, kernels: StageKernels, *, in_flight: int = 1, weights_follow: bool = False
    ) -> None:
        self._kernels = kernels
        shared = in_flight > 1 and weights_follow
        self._backward_pool = torch.cuda.graph_pool_handle() if shared else None
        self._free: list[_Slot] = []
        self._broken = False

    def forward(
        self, arguments: list[Tensor | None], keep: Callable[[list[Tensor | None]], None]
    ) -> tuple[list[Tensor | None], _Slot | None]:
        """Results of F; `keep` is shown the arguments that backward will read."""
        if self._broken:
            keep(arguments)
            return list(self._kernels.forward(arguments)), None
        slot = self._free.pop() if self._free else self._new_slot()
        slot.uses += 1
        if slot.uses == 1:
            keep(arguments)
            return list(self._kernels.forward(arguments)), slot
        static = slot.forward.stage(arguments)
        keep(static)
        try:
            results = list(slot.forward())
        except RuntimeError as error:
            self._give_up(error)
            keep(arguments)
            return list(self._kernels.forward(arguments)), None
        count = self._kernels.num_outputs
        return [_copy(tensor) for tensor in results[:count]] + results[count:], slot

    def _new_slot(self) -> _Slot:
        return _Slot(self._kernels, self._backward_pool)

    def backward(
        self, slot: _Slot | None, name: str, kernel: Kernel, arguments: list[Tensor | None]
    ) -> list[Tensor | None]:
        """Results of B (`name` = `input`) or of a part of W; releases the slot after the last."""
        results = None
        # what is captured goes on: the executor no longer has what it would need instead
        if slot is not None and slot.uses > 1 and (slot.uses > 2 or not self._broken):
            results = self._replayed(slot, name, arguments)
        if results is None:
            results = list(kernel(arguments))
        if name == self._kernels.backward_weights[-1].name:
            self.release(slot)
        return results

    def _replayed(
        self, slot: _Slot, name: str, arguments: list[Tensor | None]
    ) -> list[Tensor | None] | None:
        """Results of B or W by its graph; None if it cannot be captured."""
        graphed = slot.backward[name]
        graphed.stage(arguments)
        try:
            results = list(graphed())
        except RuntimeError as error:
            self._give_up(error)
            return None
        if name == "input":
            count = self._kernels.num_gradients
            results = [_copy(tensor) for tensor in results[:count]] + results[count:]
        return results

    def replays(self, slot: _Slot | None) -> dict[str, Callable[[], None]]:
        """What runs each kernel of `slot` once more on what it was last given: `forward`, and those
        of backward by name. Nothing, if they are not recorded."""
        if slot is None or slot.uses < 2 or self._broken:
            return {}
        backward = {name: graphed.replay for name, graphed in slot.backward.items()}
        return {"forward": slot.forward.replay, **backward}

    def release(self, slot: _Slot | None) -> None:
        """Take back a slot that will see no further kernel of its microbatch."""
        if slot is not None and not self._broken:
            self._free.append(slot)

    def _give_up(self, error: RuntimeError) -> None:
        self._broken = True
        self._free.clear()
        reason = (str(error) or type(error).__name__).splitlines()[0]
        warnings.warn(
            f"stage runs without CUDA graphs, because capturing one failed: {reason}",
            stacklevel=2,
        )


def _copy(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.clone()
