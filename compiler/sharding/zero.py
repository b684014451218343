"""ZeRO as layouts: which parts of parameters, gradients and states lie on which rank of an axis.

Over an axis on which the gradient of a parameter is a term a rank (data parallelism), its states,
then its gradient, then the parameter itself are split along the largest dim that no other axis
splits and that gives every rank a part (Rajbhandari et al., ZeRO, 2020). A parameter without such a
dim stays whole.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from ..ir.graph import Graph
from ..ir.mesh import Layout, Mesh, Partial, Placement, Shard
from ..ir.plan import ParameterLayout
from .strategy import can_shard

__all__ = ["zero_layouts"]


def zero_layouts(
    graph: Graph, mesh: Mesh, parameters: Iterable[ParameterLayout], *, axis: str, level: int
) -> tuple[ParameterLayout, ...]:
    """`parameters` with states (level 1), gradients (2) and themselves (3) in parts over `axis`."""
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
