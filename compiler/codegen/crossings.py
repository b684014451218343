"""Who sends which part of a value to whom, where stages have meshes of their own.

From the parts of a value that the ranks of one stage have, to those that the ranks of another want.
Each receiver takes the intersections of its own part with the others' parts; of the ranks that have
the same part it takes one: on its own node if there is one, and such that receivers spread evenly
over the senders. Gradients take the same way back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..ir.cluster import Cluster
from ..ir.program import TensorShard
from ..ir.types import TensorType

__all__ = ["Crossing", "crossings"]

Part = tuple[int, TensorShard]  # what a rank has, or wants


@dataclass(frozen=True, slots=True)
class Crossing:
    """A rectangle of a value that goes from one rank to another: of `type`, at `offset` of the
    whole value."""

    source: int
    target: int
    offset: tuple[int, ...]
    type: TensorType


def crossings(cluster: Cluster, have: Sequence[Part], want: Sequence[Part]) -> Iterator[Crossing]:
    """All messages that bring a value from those who `have` it to those who `want` it, both in the
    order of their meshes."""
    holders: dict[TensorShard, list[int]] = {}
    for rank, part in have:
        holders.setdefault(part, []).append(rank)
    for turn, (target, wanted) in enumerate(want):
        for part, ranks in holders.items():
            found = _intersection(part, wanted)
            if found is not None:
                source = _sender(cluster, ranks, target, turn / len(want))
                yield Crossing(source, target, *found)


def _intersection(one: TensorShard, two: TensorShard) -> tuple[tuple[int, ...], TensorType] | None:
    """Offset and type of what both have; None if that is nothing."""
    dims = list(zip(one.offset, one.part.shape, two.offset, two.part.shape, strict=True))
    begin = tuple(max(a, b) for a, _, b, _ in dims)
    end = tuple(min(a + size, b + length) for a, size, b, length in dims)
    shape = tuple(last - first for first, last in zip(begin, end, strict=True))
    return (begin, TensorType(shape, one.part.dtype)) if min(shape, default=1) > 0 else None


def _sender(cluster: Cluster, ranks: Sequence[int], target: int, place: float) -> int:
    """One of `ranks` for a receiver that stands at `place`, from 0 to 1, among the receivers."""
    node = cluster.devices[target].node
    near = [rank for rank in ranks if cluster.devices[rank].node == node] or ranks
    return near[int(place * len(near))]
