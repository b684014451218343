"""Replay a stage's kernels as CUDA graphs.

A CUDA graph reads and writes fixed addresses, while a pipeline keeps several microbatches in
flight. So each stage owns *slots*: a slot holds static tensors and graphs of F, B and the parts of
W for one microbatch in flight, and is reused when that microbatch's W is done. A slot runs eagerly
on its first use (which warms libraries up), is captured on its second, and replayed from then on.
Ranks in processes of their own do the first two before the first step (`Executor.rehearse`).

Graphs of one slot share a memory pool; slots do not share one, because a replay of one slot would
overwrite temporaries that another slot still keeps. What a part of W hands to later parts is kept
until those are recorded, and no longer: its addresses are in their graphs, which are replayed in
one order, and graphs recorded after the last reader use its memory.
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
        keeps: whether it has its results at every call; else at the first alone, None afterwards.
    """

    def __init__(
        self, kernel: Kernel, dynamic: frozenset[int], pool: Any, *, keeps: bool = True
    ) -> None:
        self._kernel = kernel
        self._dynamic = dynamic
        self._pool = pool
        self._keeps = keeps
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
                if static is not None and tensor is not None:
                    static.copy_(tensor)
        return list(self._static)

    def __call__(self) -> Sequence[Tensor | None]:
        if self._graph is None:
            self._graph = self._capture()
        self._graph.replay()
        results = self._results
        if not self._keeps:
            self._results = [None] * len(results)
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

    def __init__(self, kernels: StageKernels) -> None:
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
        if kernels.backward_input is not None:
            tangents = _tangents(kernels.input_sources)
            self.backward["input"] = _GraphedKernel(kernels.backward_input, tangents, pool)
        for part in kernels.backward_weights:
            self.backward[part.name] = _GraphedKernel(
                part.kernel, _tangents(part.sources), pool, keeps=False
            )


def _tangents(sources: Sequence[tuple[Source, int]]) -> frozenset[int]:
    return frozenset(i for i, (kind, _) in enumerate(sources) if kind is Source.TANGENT)


class GraphSlots:
    """Runs a stage's kernels through slots; falls back to plain kernels with a warning.

    `forward` returns the slot used, to be given to the backward calls of the same microbatch.
    """

    def __init__(self, kernels: StageKernels) -> None:
        self._kernels = kernels
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
        slot = self._free.pop() if self._free else _Slot(self._kernels)
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
