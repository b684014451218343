"""ZeRO (Rajbhandari et al., 2020) in layouts: states, gradients, parameters sharded over an axis.

Every rank of the axis would hold and update the same parameter. Instead each updates a part of it:
level 1 shards the optimizer's states, level 2 also the gradients while they accumulate over
microbatches, level 3 also the parameters between their uses.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..ir.graph import Graph, Value, ValueKind
from ..ir.mesh import Layout, Placement, Replicate, Shard
from ..ir.plan import ParameterLayout
from .sharding import Sharding
from .strategy import can_shard

__all__ = ["Division", "division", "zero_layouts"]


@dataclass(frozen=True, slots=True)
class Division:
    """Ranks along `axis` (its position in the mesh) hold the same part of a parameter, and each
    updates its share of that along `dim`.

    Args:
        early: whether backward keeps the share of the gradient only.
    """

    axis: int
    dim: int
    early: bool


def division(sharding: Sharding, value: Value) -> Division | None:
    """How the update of a parameter is divided; None: every rank updates all that it holds."""
    entry = sharding.parameters.get(value.name)
    if entry is None:
        return None
    layouts = entry.held, entry.gradient, entry.state
    sides = zip(*(layout.placements for layout in layouts), strict=True)
    for axis, (held, gradient, state) in enumerate(sides):
        if isinstance(state, Shard) and not isinstance(held, Shard):
            return Division(axis, state.dim, isinstance(gradient, Shard))
    return None


def zero_layouts(
    graph: Graph, sharding: Sharding, axis: str, level: int, *, offloaded: bool = False
) -> tuple[ParameterLayout, ...]:
    """Layouts of the parameters of `graph` under ZeRO of `level` over `axis`.

    A parameter is divided along a dim that no other axis shards and of which every rank gets some:
    the first that comes out even, whose shares lie in one piece if it is the first of all, or else
    the largest. One that has none, or is held sharded over the axis, keeps its layout.

    Args:
        sharding: layouts without ZeRO.
        level: 0 (all of it on every rank) to 3.
        offloaded: keep the optimizer's states in the memory of the host.
    """
    assert 0 <= level <= 3, f"there is no level {level} of ZeRO"
    names = [item.name for item in sharding.mesh.axes]
    found = []
    for value in graph.values_of(ValueKind.PARAMETER):
        entry = sharding.parameters.get(value.name) or _whole(sharding, value)
        if value.requires_grad:
            entry = replace(entry, offloaded=offloaded)
            if level and axis in names:
                entry = _divided(sharding, value, entry, names.index(axis), level)
        if entry != _whole(sharding, value):
            found.append(entry)
    return tuple(found)


def _whole(sharding: Sharding, value: Value) -> ParameterLayout:
    layout = sharding.replicated
    return ParameterLayout(value.name, layout, layout, layout)


def _divided(
    sharding: Sharding, value: Value, entry: ParameterLayout, axis: int, level: int
) -> ParameterLayout:
    held = entry.held.placements
    size = sharding.mesh.axes[axis].size
    taken = {item.dim for item in held if isinstance(item, Shard)}
    dims = [
        dim
        for dim in range(len(value.type.shape))
        if dim not in taken and can_shard(value.type, dim, size)
    ]
    if size == 1 or not dims or not isinstance(held[axis], Replicate):
        return entry
    shape = value.type.shape
    share = Shard(
        max(
            dims, key=lambda dim: (-dim, 0) if shape[dim] % size == 0 else (-len(shape), shape[dim])
        )
    )
    gradient = sharding.gradient_layout(value)
    return replace(
        entry,
        held=_with(entry.held, axis, share) if level == 3 else entry.held,
        gradient=_with(gradient, axis, share) if level >= 2 else gradient,
        state=_with(entry.held, axis, share),
    )


def _with(layout: Layout, axis: int, placement: Placement) -> Layout:
    """`layout` with another placement on one axis."""
    rows = layout.placements
    return Layout((*rows[:axis], placement, *rows[axis + 1 :]))
