"""Spread stage graphs over the in-stage mesh: what each rank of a stage runs and holds.

The ranks at one place of the mesh, one a stage, are a *column*. A column runs the pipeline by
itself; columns meet in the collectives of their stages, and where gradients are summed.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace

from ..ir.graph import Graph, Mode, Value, ValueKind
from ..ir.mesh import Mesh, Partial, Shard
from ..ir.plan import Plan
from ..ir.program import StageProgram, TensorShard
from ..sharding.localize import localize
from ..sharding.recompute import recomputed_locally
from ..sharding.sharding import Sharding
from .cut import cut_stages

__all__ = ["Column", "Copies", "make_columns", "parameter_copies"]

Place = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Column:
    """The local stages at one place of the mesh.

    Args:
        ranks: of each stage.
        shards: per stage, parts of the tensors that its rank does not hold whole.
    """

    place: Place
    ranks: tuple[int, ...]
    stages: tuple[StageProgram, ...]
    shards: tuple[tuple[TensorShard, ...], ...]

    def shards_of(self, rank: int) -> tuple[TensorShard, ...]:
        """All parts that `rank` holds; a tensor that two of its stages use is held once."""
        found = {
            shard.name: shard
            for home, shards in zip(self.ranks, self.shards, strict=True)
            if home == rank
            for shard in shards
        }
        return tuple(found[name] for name in sorted(found))


@dataclass(frozen=True, slots=True)
class Copies:
    """The copies of one trained parameter.

    Args:
        terms: rank -> ranks whose gradients are terms of one sum, itself among them, ascending.
        owners: ranks whose parts, together, are the whole parameter once.
    """

    terms: dict[int, tuple[int, ...]]
    owners: frozenset[int]


def make_columns(graph: Graph, plan: Plan) -> tuple[Column, ...]:
    """The columns of `plan`, in the order of the mesh.

    Raises:
        VerificationError: a layout is illegal, or a stage reads what no stage up to it computes.
    """
    stages = cut_stages(graph, plan.stages, frozenset(plan.recomputed))
    if plan.stage_mesh.size == 1:
        ranks = tuple(stage.device for stage in plan.stages)
        return (Column((), ranks, stages, ((),) * len(stages)),)
    sharding = Sharding.of(plan, graph)
    return tuple(
        _column(plan, sharding, stages, number, place)
        for number, place in enumerate(_places(plan.stage_mesh))
    )


def _places(mesh: Mesh) -> Iterable[Place]:
    return itertools.product(*(range(axis.size) for axis in mesh.axes))


def _column(
    plan: Plan,
    sharding: Sharding,
    stages: tuple[StageProgram, ...],
    number: int,
    place: Place,
) -> Column:
    parts = [localize(stage.graph, sharding, place) for stage in stages]
    return Column(
        place=place,
        ranks=tuple(stage.devices[number] for stage in plan.stages),
        stages=tuple(
            replace(
                stage,
                graph=part.graph,
                recomputed=recomputed_locally(part, frozenset(stage.recomputed)),
                axes=_axes(sharding.mesh, place, plan.stages[stage.index].devices),
            )
            for stage, part in zip(stages, parts, strict=True)
        ),
        shards=tuple(part.shards for part in parts),
    )


def _axes(
    mesh: Mesh, place: Place, devices: tuple[int, ...]
) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Per axis, the ranks of a stage that differ from `place` along it alone."""
    device = dict(zip(_places(mesh), devices, strict=True))
    return tuple(
        (
            axis.name,
            tuple(
                device[(*place[:position], index, *place[position + 1 :])]
                for index in range(axis.size)
            ),
        )
        for position, axis in enumerate(mesh.axes)
        if axis.size > 1
    )


def parameter_copies(graph: Graph, plan: Plan, columns: tuple[Column, ...]) -> dict[str, Copies]:
    """The copies of every trained parameter, by name."""
    if graph.mode is not Mode.TRAIN:
        return {}
    sharding = Sharding.of(plan, graph)
    holders: dict[str, dict[Place, set[int]]] = defaultdict(lambda: defaultdict(set))
    values: dict[str, Value] = {}
    for column in columns:
        for rank, stage in zip(column.ranks, column.stages, strict=True):
            for value in stage.graph.values_of(ValueKind.PARAMETER):
                if value.requires_grad:
                    holders[value.origin][column.place].add(rank)
                    values[value.origin] = value
    return {name: _copies(sharding, values[name], holders[name]) for name in sorted(holders)}


def _copies(sharding: Sharding, value: Value, holders: dict[Place, set[int]]) -> Copies:
    gradient = sharding.gradient_layout(value)
    summed = [axis for axis, item in enumerate(gradient.placements) if isinstance(item, Partial)]
    shared = [
        axis
        for axis, item in enumerate(sharding.layout(value).placements)
        if not isinstance(item, Shard)
    ]

    def without(place: Place, axes: list[int]) -> Place:
        return tuple(0 if axis in axes else index for axis, index in enumerate(place))

    groups: dict[Place, set[int]] = defaultdict(set)
    for place, ranks in holders.items():
        groups[without(place, summed)] |= ranks
    return Copies(
        terms={
            rank: tuple(sorted(groups[without(place, summed)]))
            for place, ranks in holders.items()
            for rank in ranks
        },
        owners=frozenset(
            min(ranks) for place, ranks in holders.items() if without(place, shared) == place
        ),
    )
