"""ZeRO as layouts: which parts of parameters, gradients and states lie on which rank of an axis.

Over an axis on which the gradient of a parameter is a term a rank (data parallelism), its states,
then its gradient, then the parameter itself are split along the largest dim that no other axis
splits and that gives every rank a part (Rajbhandari et al., ZeRO, 2020). A parameter without such a
dim stays whole.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from ..ir.graph import Graph
from ..ir.mesh import Layout, Mesh, Partial, Placement, Shard
from ..ir.plan import ParameterLayout
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


def division(entry: ParameterLayout | None) -> Division | None:
    """How the update of a parameter is divided; None: every rank updates all that it holds."""
    if entry is None:
        return None
    layouts = entry.held, entry.gradient, entry.state
    sides = zip(*(layout.placements for layout in layouts), strict=True)
    for axis, (held, gradient, state) in enumerate(sides):
        if isinstance(state, Shard) and not isinstance(held, Shard):
            return Division(axis, state.dim, isinstance(gradient, Shard))
    return None


def zero_layouts(
    graph: Graph, mesh: Mesh, parameters: Iterable[ParameterLayout], *, axis: str, level: int
) -> tuple[ParameterLayout, ...]:
    """`parameters` with states (level 1), gradients (2) and themselves (3) in parts over `axis`."""
    if level == 0:
        return tuple(parameters)
    number = [entry.name for entry in mesh.axes].index(axis)
    values = graph.by_name()
    table = []
    for entry in parameters:
        type = values[entry.value].type
        taken = {item.dim for item in entry.held.placements if isinstance(item, Shard)}
        dims = [
            dim
            for dim in range(len(type.shape))
            if dim not in taken and can_shard(type, dim, mesh.axes[number].size)
        ]
        if not dims or not isinstance(entry.gradient.placements[number], Partial):
            table.append(entry)
            continue
        part = Shard(max(dims, key=lambda dim: (type.shape[dim], -dim)))
        changes = {"state": part}
        if level >= 2:
            changes["gradient"] = part
        if level >= 3:
            changes["held"] = part
        table.append(
            replace(
                entry,
                **{n: _with(getattr(entry, n), number, new) for n, new in changes.items()},
            )
        )
    return tuple(table)


def _with(layout: Layout, axis: int, placement: Placement) -> Layout:
    placements = list(layout.placements)
    placements[axis] = placement
    return Layout(tuple(placements))
