"""The copies of trained parameters: whose gradients are summed, and who updates which part.

Ranks hold copies where an axis replicates a parameter and where several stages use it. Their
gradients are terms of one sum along the axes on which the gradient is deferred, and over stages. If
the plan shards the optimizer's states over an axis on which the parameter is not held sharded
(ZeRO), the ranks along it each update their share.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace

from ..ir.errors import VerificationError
from ..ir.graph import Graph, Mode, Value, ValueKind, users
from ..ir.mesh import Layout, Partial, Shard, local_offset, local_type
from ..ir.plan import Plan
from ..ir.program import StageProgram, TensorShard
from ..ir.types import TensorType
from ..sharding.sharding import Sharding
from ..sharding.zero import Division, division
from .columns import Column, Place

__all__ = ["Copy", "parameter_copies"]


@dataclass(frozen=True, slots=True)
class Copy:
    """A trained parameter on one rank.

    Args:
        held: type of what it holds.
        first_use: node of the whole graph; the gradient is complete once its backward is done.
        terms: ranks whose gradients are terms of one sum, itself among them, ascending.
        update: the part that it updates; None: all that it holds.
        dim, peers: along which dim which ranks share the update, in the order of their shares.
        is_scattered: whether `peers` sum and share out the gradient at the end of the step.
        summed: ranks over which its part of the gradient is summed after that.
        is_tied: whether other stages of the column hold it, too.
        is_owner: whether this copy of the part counts in the norm.
        is_offloaded: whether its optimizer states lie on the host.
        copies: see `AllReduce`, of the sum over `summed`.
    """

    held: TensorType
    first_use: int
    terms: tuple[int, ...]
    update: TensorShard | None
    dim: int
    peers: tuple[int, ...]
    is_scattered: bool
    summed: tuple[int, ...]
    is_tied: bool
    is_owner: bool
    is_offloaded: bool
    copies: tuple[int, ...] = ()

    @property
    def updated(self) -> TensorType:
        """Type of what the rank updates."""
        return self.held if self.update is None else self.update.part


def parameter_copies(
    graph: Graph, plan: Plan, columns: tuple[Column, ...]
) -> dict[str, dict[int, Copy]]:
    """The copies of every trained parameter: its name -> rank -> copy, in the order of names."""
    if graph.mode is not Mode.TRAIN:
        return {}
    whole = Sharding.of(plan, graph) if not plan.is_mixed else None
    shardings: dict[int, Sharding] = {}
    holders: dict[str, dict[int, dict[Place, dict[int, StageProgram]]]]
    holders = defaultdict(lambda: defaultdict(lambda: defaultdict(dict)))
    for column in columns:
        for rank, stage in zip(column.ranks, column.stages, strict=True):
            mesh = stage.index if whole is None else 0  # of which stage the mesh is
            sharding = whole or column.sharding
            assert sharding is not None
            shardings[mesh] = sharding
            for value in stage.graph.values_of(ValueKind.PARAMETER):
                if value.requires_grad:
                    holders[value.origin][mesh][column.place].setdefault(rank, stage)
    read_by = users(graph)
    values = {value.origin: value for value in graph.values_of(ValueKind.PARAMETER)}
    return {
        name: _joined(
            values[name],
            [
                _Copies(shardings[mesh], values[name], min(read_by[values[name].id]), found).all()
                for mesh, found in sorted(holders[name].items())
            ],
        )
        for name in sorted(holders)
    }


def _joined(value: Value, by_mesh: list[dict[int, Copy]]) -> dict[int, Copy]:
    """The copies of `value` over all meshes: one sum over all ranks, each term counted once.

    Raises:
        VerificationError: ranks of one mesh hold parts of it, or share the update (ZeRO).
    """
    if len(by_mesh) == 1:
        return by_mesh[0]
    counts: dict[int, int] = {}
    for copies in by_mesh:
        entries = copies.values()
        if any(copy.update is not None or copy.held != value.type for copy in entries):
            raise VerificationError(
                "stages with meshes of their own use it, and ranks of one of them hold but parts "
                "of it or share its update",
                where=f"parameter {value.origin!r}",
                ways_out=(
                    "replicate it in these stages, without ZeRO",
                    "put the nodes that use it into one stage",
                    "give all stages the same mesh",
                ),
            )
        counts.update({rank: len(copies) // len(copy.terms) for rank, copy in copies.items()})
    ranks = tuple(sorted(counts))
    table = tuple(counts[rank] for rank in ranks)
    return {
        rank: replace(
            copy,
            terms=ranks,
            summed=ranks,
            is_tied=True,
            is_owner=rank == ranks[0],
            copies=table if max(table) > 1 else (),
        )
        for copies in by_mesh
        for rank, copy in copies.items()
    }


class _Copies:
    """Working state: one parameter."""

    def __init__(
        self,
        sharding: Sharding,
        value: Value,
        first_use: int,
        holders: Mapping[Place, Mapping[int, StageProgram]],
    ) -> None:
        self.sharding = sharding
        self.value = value
        self.first_use = first_use
        self.holders = holders
        entry = sharding.parameters.get(value.name)
        self.division: Division | None = division(sharding, value)
        self.held: Layout = sharding.layout(value)
        self.state = entry.state if entry is not None and self.division else self.held
        self.is_offloaded = entry is not None and entry.offloaded
        gradient = sharding.gradient_layout(value).placements
        self.summed = [axis for axis, item in enumerate(gradient) if isinstance(item, Partial)]
        self.shared = [
            axis for axis, item in enumerate(self.state.placements) if not isinstance(item, Shard)
        ]
        self.groups: dict[Place, list[Place]] = defaultdict(list)
        for place in holders:
            self.groups[_without(place, self.summed)].append(place)

    def all(self) -> dict[int, Copy]:
        return {
            rank: self._copy(place, rank, stage)
            for place, ranks in self.holders.items()
            for rank, stage in ranks.items()
        }

    def _copy(self, place: Place, rank: int, stage: StageProgram) -> Copy:
        group = self.groups[_without(place, self.summed)]
        summed, dim, is_scattered = group, 0, False
        peers: tuple[int, ...] = (rank,)
        if self.division is not None:
            axis, dim = self.division.axis, self.division.dim
            summed = [other for other in group if other[axis] == place[axis]]
            peers = dict(stage.axes)[self.sharding.mesh.axes[axis].name]
            is_scattered = axis in self.summed and not self.division.early
        return Copy(
            held=self._type(self.held, place),
            first_use=self.first_use,
            terms=self._ranks(group),
            update=self._update(place),
            dim=dim,
            peers=peers,
            is_scattered=is_scattered,
            summed=self._ranks(summed),
            is_tied=len(self.holders[place]) > 1,
            is_owner=_without(place, self.shared) == place and rank == min(self.holders[place]),
            is_offloaded=self.is_offloaded,
        )

    def _type(self, layout: Layout, place: Place) -> TensorType:
        return local_type(self.value.type, layout, self.sharding.mesh, place)

    def _update(self, place: Place) -> TensorShard | None:
        if self.division is None:
            return None
        whole = self.value.type
        offset = local_offset(whole, self.state, self.sharding.mesh, place)
        return TensorShard(self.value.origin, whole, offset, self._type(self.state, place))

    def _ranks(self, places: list[Place]) -> tuple[int, ...]:
        return tuple(sorted({rank for place in places for rank in self.holders[place]}))


def _without(place: Place, axes: list[int]) -> Place:
    return tuple(0 if axis in axes else index for axis, index in enumerate(place))
