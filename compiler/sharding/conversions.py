"""Conversions of one value from the layout it is made in to the layout that a reader wants.

The localizer emits them and the planner prices what they emit, so that both mean the same.
"""

from __future__ import annotations

from ..ir.graph import Node
from ..ir.mesh import Layout, Partial, Placement, Replicate, Shard
from .lowering import LocalGraph, Ref

__all__ = ["can_convert", "conversion_steps", "convert"]


def convert(
    local: LocalGraph,
    ref: Ref,
    shape: tuple[int, ...],
    *,
    made: Layout,
    wanted: Layout,
    partial: frozenset[int],
    like: Node,
) -> Ref:
    """`ref`, local part of a tensor of `shape` laid out as `made`, in the layout `wanted`.

    Args:
        partial: axes on which the gradient of the result is a term a rank.
        like: the node that conversions are named after.
    """
    for axis, old, new in conversion_steps(made, wanted):
        ref = _convert_axis(local, ref, shape, axis, (old, new), axis in partial, like)
    for axis in sorted(partial):
        if not isinstance(made.placements[axis], Shard):
            ref = local.sum_gradient(ref, local.mesh.axes[axis].name, like)
    return ref


def _convert_axis(
    local: LocalGraph,
    ref: Ref,
    shape: tuple[int, ...],
    axis: int,
    change: tuple[Placement, Placement],
    partial: bool,
    like: Node,
) -> Ref:
    name = local.mesh.axes[axis].name
    match change:
        case Shard(old), Shard(new) if old != new:
            return local.all_to_all(
                ref, name, from_dim=old, from_size=shape[old], to_dim=new, like=like
            )
        case Shard(old), Replicate():
            return local.all_gather(ref, name, old, shape[old], like, partial_gradient=partial)
        case Partial(reduction), Replicate():
            return local.all_reduce(ref, name, like, reduction)
        case Partial("sum"), Shard(new):
            return local.reduce_scatter(ref, name, new, like)
        case Replicate(), Shard(new):
            return local.shard(ref, name, new, like)
        case Replicate(), Partial("sum"):
            return local.as_partial(ref, name, like)
        case Shard(old), Partial("sum"):
            return local.pad_part(ref, name, old, shape[old], like)
        case old, new:
            assert old == new, f"no conversion from {old} to {new}"
            return ref


def can_convert(made: Placement, wanted: Placement) -> bool:
    """Whether there is a conversion: only sums are made of what is no term yet."""
    if isinstance(wanted, Partial):
        return made == wanted or (not isinstance(made, Partial) and wanted.reduction == "sum")
    if isinstance(made, Partial) and isinstance(wanted, Shard):
        return made.reduction == "sum"
    return True


def conversion_steps(made: Layout, wanted: Layout) -> tuple[tuple[int, Placement, Placement], ...]:
    """(axis, old, new) in the order in which placements change.

    What makes tensors smaller comes first; but a dim is split over an axis only when no other axis
    splits it any more. Of two axes that exchange their dims, one is made whole on the way.
    """
    now = list(made.placements)
    steps: list[tuple[int, Placement, Placement]] = []
    while now != list(wanted.placements):
        changing = [axis for axis, old in enumerate(now) if old != wanted.placements[axis]]
        free = [
            axis
            for axis in changing
            if not isinstance(wanted.placements[axis], Shard)
            or all(now[other] != wanted.placements[axis] for other in range(len(now)))
        ]
        axis = min(
            free or changing, key=lambda axis: (_growth(now[axis], wanted.placements[axis]), axis)
        )
        new = wanted.placements[axis] if free else Replicate()
        steps.append((axis, now[axis], new))
        now[axis] = new
    return tuple(steps)


def _growth(old: Placement, new: Placement) -> int:
    """Smaller comes first: splitting, exchanging, summing, gathering."""
    if isinstance(new, Shard):
        return 1 if isinstance(old, Shard) else 0
    return 3 if isinstance(old, Shard) else 2
