"""Spread stage graphs over the in-stage mesh: what each rank of a stage runs and holds.

The ranks at one place of the mesh, one a stage, are a *column*. A column runs the pipeline by
itself; columns meet in the collectives of their stages, and where gradients are summed. Where
stages have meshes of their own, every rank is by itself, with its stage.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from ..ir.graph import Graph, Mode, OutputKind, ValueKind
from ..ir.mesh import Mesh, local_offset, local_type
from ..ir.plan import Plan
from ..ir.program import GradientPart, StageProgram, TensorShard
from ..sharding.localize import localize_each
from ..sharding.recompute import recomputed_locally
from ..sharding.sharding import Sharding, stage_sharding
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
        sharding: of the only stage, where it has a mesh of its own.
    """

    place: Place
    ranks: tuple[int, ...]
    stages: tuple[StageProgram, ...]
    shards: tuple[tuple[TensorShard, ...], ...]
    sharding: Sharding | None = None

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
    if plan.is_mixed:
        return tuple(column for stage in stages for column in _own_columns(graph, plan, stage))
    if plan.stage_mesh.size == 1:
        ranks = tuple(stage.device for stage in plan.stages)
        return (Column((), ranks, stages, ((),) * len(stages)),)
    sharding = Sharding.of(plan, graph)
    places = tuple(_places(plan.stage_mesh))
    table = [_local_stages(plan, sharding, stage, places) for stage in stages]
    return tuple(
        Column(
            place=place,
            ranks=tuple(stage.devices[number] for stage in plan.stages),
            stages=tuple(row[number][0] for row in table),
            shards=tuple(row[number][1] for row in table),
        )
        for number, place in enumerate(places)
    )


def _own_columns(graph: Graph, plan: Plan, stage: StageProgram) -> Iterator[Column]:
    """The ranks of a stage with a mesh of its own, in the order of the mesh."""
    planned = plan.stages[stage.index]
    sharding = stage_sharding(plan, graph, planned, stage.graph)
    places = tuple(_places(sharding.mesh))
    local = [(stage, ())] if len(places) == 1 else _local_stages(plan, sharding, stage, places)
    for place, rank, (part, shards) in zip(places, planned.devices, local, strict=True):
        part = replace(part, boundaries=tuple(_boundaries(sharding, stage.graph, place)))
        yield Column(place, (rank,), (part,), (shards,), sharding)


def _boundaries(sharding: Sharding, graph: Graph, place: Place) -> Iterator[TensorShard]:
    """The parts that the rank at `place` has of the values that cross the bounds of a stage."""
    received = graph.values_of(ValueKind.BOUNDARY)
    sent = [graph.values[output.value] for output in graph.outputs_of(OutputKind.BOUNDARY)]
    for value in (*received, *sent):
        layout = sharding.crossing_layout(value)
        offset = local_offset(value.type, layout, sharding.mesh, place)
        part = local_type(value.type, layout, sharding.mesh, place)
        yield TensorShard(value.name, value.type, offset, part)


def _places(mesh: Mesh) -> Iterable[Place]:
    return itertools.product(*(range(axis.size) for axis in mesh.axes))


def _local_stages(
    plan: Plan, sharding: Sharding, stage: StageProgram, places: tuple[Place, ...]
) -> list[tuple[StageProgram, tuple[TensorShard, ...]]]:
    """`stage` at each of `places`, with the parts of tensors that are held there."""
    kept = tuple(_kept(sharding, stage.graph))
    again: dict[int, tuple[int, ...]] = {}  # by identity of the local graph, which places share
    table = []
    for place, part in zip(places, localize_each(stage.graph, sharding, places), strict=True):
        if id(part.graph) not in again:
            again[id(part.graph)] = recomputed_locally(part, frozenset(stage.recomputed))
        local = replace(
            stage,
            graph=part.graph,
            recomputed=again[id(part.graph)],
            axes=_axes(sharding.mesh, place, plan.stages[stage.index].devices),
            kept=kept,
        )
        table.append((local, part.shards))
    return table


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
