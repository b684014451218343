"""Collectives of one rank alone: of the right shape, at once and without meaning.

So the computation of a stage can be measured without the other ranks of its mesh; what collectives
take is the business of the links. Results are made once and given again, as on the way they would
arrive in memory that is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx

from ..compiler.ir.collectives import NAMESPACE
from ..compiler.ir.program import StageProgram
from .collective_ops import StageCollectives
from .communicator import Communicator, Split

__all__ = ["StandIns", "filled"]


def filled(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor with normal numbers; ones of what is no float."""
    if not (dtype.is_floating_point or dtype.is_complex):
        return torch.ones(tuple(shape), dtype=dtype, device=device)
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(tuple(shape), generator=generator)
    return numbers.to(device=device, dtype=dtype)


@dataclass(frozen=True, slots=True)
class _Ready:
    """A communication that is complete."""

    tensor: Tensor

    def done(self) -> bool:
        return True

    def wait(self, timeout_seconds: float | None = None) -> Tensor:
        return self.tensor


class _Alone:
    """What `StageCollectives` needs of a communicator."""

    def __init__(self) -> None:
        self._made: dict[tuple[tuple[int, ...], torch.dtype], Tensor] = {}

    def _result(self, like: Tensor, shape: tuple[int, ...]) -> _Ready:
        key = shape, like.dtype
        if key not in self._made:
            self._made[key] = filled(shape, like.dtype, like.device)
        return _Ready(self._made[key])

    def is_capturable(self, ranks: Sequence[int]) -> bool:
        return True

    def start_all_reduce(
        self, tensor: Tensor, ranks: object, reduction: str, *, label: str
    ) -> _Ready:
        return _Ready(tensor)

    def start_all_gather(
        self, tensor: Tensor, ranks: object, split: Split, *, label: str
    ) -> _Ready:
        return self._result(tensor, split.shape(tensor.shape, sum(split.sizes)))

    def start_reduce_scatter(
        self, tensor: Tensor, ranks: object, split: Split, *, label: str
    ) -> _Ready:
        return self._result(tensor, split.shape(tensor.shape, split.sizes[0]))

    def start_all_to_all(
        self, tensor: Tensor, ranks: object, *, gathered: Split, split: Split, label: str
    ) -> _Ready:
        shape = gathered.shape(tensor.shape, sum(gathered.sizes))
        return self._result(tensor, split.shape(shape, split.sizes[0]))


class StandIns(StageCollectives):
    """The collectives of `stage` on its first rank, without the others."""

    def __init__(self, stage: StageProgram) -> None:
        super().__init__(cast(Communicator, _Alone()), dict(stage.axes), stage.index)

    def functional(self, module: fx.GraphModule) -> tuple[fx.GraphModule, str]:
        """`module` with plain functions of tensors, which Inductor compiles."""
        graph = fx.Graph()
        graph.output(graph.graph_copy(module.graph, {}))
        for node in graph.nodes:
            target = node.target
            if isinstance(target, torch._ops.OpOverload) and target.namespace == NAMESPACE:
                node.target = _of_shape
                node.args = (node.args[0], tuple(node.meta["val"].shape))
        return fx.GraphModule(module, graph), ""


def _of_shape(x: Any, shape: tuple[int, ...]) -> Tensor:
    """`x`, cut or repeated in every dim."""
    for dim, size in enumerate(shape):
        if size > x.shape[dim]:
            x = torch.cat([x] * -(-size // max(1, x.shape[dim])), dim)
        x = x.narrow(dim, 0, size)
    return cast(Tensor, x.contiguous())
