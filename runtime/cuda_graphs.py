"""Replay a stage's kernels as CUDA graphs.

A CUDA graph reads and writes fixed addresses, while a pipeline keeps several microbatches in
flight. So each stage owns *slots*: a slot holds static tensors and graphs of F, B and the parts of
W for one microbatch in flight, and is reused when that microbatch's W is done. A slot runs eagerly
on its first use (which warms libraries up), is captured on its second, and replayed from then on.
Ranks in processes of their own do the first two before the first step (`Executor.rehearse`).

Graphs of one slot share a memory pool. What F saves lives until the backward of its microbatch, so
slots do not share the pool of their F: a replay of one would overwrite what another keeps. B and W
do share one where the W of a microbatch follows its B at once: nothing of them outlives W but the
gradients of inputs. What only later graphs of a slot read is not held here once all are captured.
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
    """One kernel on static inputs; `dynamic` are positions of inputs that change address."""

    def __init__(self, kernel: Kernel, dynamic: frozenset[int], pool: Any) -> None:
        self._kernel = kernel
        self._dynamic = dynamic
        self._pool = pool
        self._graph: torch.cuda.CUDAGraph | None = None
        self._static: list[Tensor | None] = []
        self._results: Sequence[Tensor | None] = ()

    def forget(self, kept: int) -> None:
        """Hold no more than what changes from replay to replay, and the first `kept` results.

        The graph goes on reading and writing the others' addresses, which its pool keeps for it.
        """
        self._static = [
            tensor if position in self._dynamic else None
            for position, tensor in enumerate(self._static)
        ]
        self._results = [*self._results[:kept], *[None] * len(self._results[kept:])]

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
                if static is not None and tensor is not None:
                    static.copy_(tensor)
        return list(self._static)

    def __call__(self) -> Sequence[Tensor | None]:
        if self._graph is None:
            self._graph = self._capture()
        self._graph.replay()
        return self._results

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
        self.uses = 0
        self.forward = _GraphedKernel(kernels.forward, frozenset(dynamic), pool)
        self.backward: dict[str, _GraphedKernel] = {}
        weights = [(part.name, part.kernel, part.sources) for part in kernels.backward_weights]
        for name, kernel, sources in (
            ("input", kernels.backward_input, kernels.input_sources),
            *weights,
        ):
            if kernel is not None:
                tangents = {i for i, (kind, _) in enumerate(sources) if kind is Source.TANGENT}
                self.backward[name] = _GraphedKernel(
                    kernel, frozenset(tangents), backward_pool or pool
                )

    def forget(self, num_gradients: int) -> None:
        """Hold of the backward only the gradients of inputs, once all its graphs are captured."""
        for name, graphed in self.backward.items():
            graphed.forget(num_gradients if name == "input" else 0)


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
        self._num_gradients = len(kernels.signature.differentiable) - len(kernels.zero_inputs)
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
        if slot is not None and slot.uses > 1 and not self._broken:
            results = self._replayed(slot, name, arguments)
        if results is None:
            results = list(kernel(arguments))
        if name == self._kernels.backward_weights[-1].name:
            if slot is not None and slot.uses == 2 and not self._broken:
                slot.forget(self._num_gradients)
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
            count = self._num_gradients
            results = [_copy(tensor) for tensor in results[:count]] + results[count:]
        return results

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
