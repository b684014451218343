"""Spread stage graphs over the in-stage mesh: what each rank of a stage runs and holds.

The ranks at one place of the mesh, one a stage, are a *column*. A column runs the pipeline by
itself; columns meet in the collectives of their stages, and where gradients are summed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from ..ir.graph import Graph, Mode, ValueKind
from ..ir.mesh import Mesh
from ..ir.plan import Plan
from ..ir.program import GradientPart, StageProgram, TensorShard
from ..sharding.localize import localize
from ..sharding.recompute import recomputed_locally
from ..sharding.sharding import Sharding
from ..sharding.zero import division
from .cut import cut_stages

__all__ = ["Column", "Place", "make_columns"]

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
                kept=tuple(_kept(sharding, stage.graph)),
            )
            for stage, part in zip(stages, parts, strict=True)
        ),
        shards=tuple(part.shards for part in parts),
    )


def _kept(sharding: Sharding, graph: Graph) -> Iterator[GradientPart]:
    """The gradients of which a stage's backward keeps a part only."""
    if graph.mode is not Mode.TRAIN:
        return
    for value in graph.values_of(ValueKind.PARAMETER):
        share = division(sharding, value)
        if value.requires_grad and share is not None and share.early:
            summed = share.axis in sharding.deferred.get(value.name, frozenset())
            axis = sharding.mesh.axes[share.axis].name
            yield GradientPart(value.origin, axis, share.dim, summed)


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
