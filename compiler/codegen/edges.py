"""Which values each action makes and reads on each rank, and where they go.

In a column of the in-stage mesh a value goes whole (that is, as the part that the rank has) from
the rank of one stage to that of another. Where stages have meshes of their own, rectangles of it go
between the ranks of both (`crossings.py`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from ..ir.cluster import Cluster
from ..ir.program import Register, StageProgram, TensorShard
from ..ir.schedule import Action, ActionKind, Schedule
from ..ir.types import TensorType
from .columns import Column
from .crossings import Crossing, crossings

__all__ = ["Edge", "Edges"]

_FORWARD = (ActionKind.FORWARD,)
_BACKWARD = (ActionKind.BACKWARD, ActionKind.BACKWARD_INPUT)


@dataclass(frozen=True, slots=True)
class Edge:
    """A value that one stage's action makes and another rank's (or stage's) reads.

    `consumer` is set for gradients. Tags of the microbatches are `first_tag`, `first_tag + 1`, ...
    With `offset`, it is a rectangle of the value. What no other rank takes has its own as target.
    """

    value: str
    consumer: int | None
    type: TensorType
    source: int
    target: int
    first_tag: int
    offset: tuple[int, ...] | None = None

    def register(self, microbatch: int) -> Register:
        return Register(self.value, microbatch, self.consumer)


class Edges:
    """Edges of all ranks, by kind of action, stage and rank."""

    def __init__(self, num_microbatches: int) -> None:
        self._num_microbatches = num_microbatches
        self._made: dict[tuple[ActionKind, int, int], list[Edge]] = defaultdict(list)
        self._read: dict[tuple[ActionKind, int, int], list[Edge]] = defaultdict(list)
        self._sent: dict[tuple[int, int, Register], int] = {}  # (source, target, register) -> turn
        self._ranks: dict[int, set[int]] = defaultdict(set)  # by stage

    @staticmethod
    def of(
        columns: tuple[Column, ...], cluster: Cluster, num_microbatches: int, schedule: Schedule
    ) -> Edges:
        """The edges of `columns`, in the order in which ranks send under `schedule`."""
        edges = Edges(num_microbatches)
        if columns[0].sharding is None:
            for column in columns:
                edges._add_column(column)
        else:
            edges._add_stages(columns, cluster)
        for column in columns:
            for rank, stage in zip(column.ranks, column.stages, strict=True):
                edges._ranks[stage.index].add(rank)
        edges._order_by(schedule)
        return edges

    def turn(self, source: int, target: int, register: Register) -> int:
        """Place of a message among all that its sender sends."""
        return self._sent[source, target, register]

    def made_by(self, rank: int, action: Action) -> list[Edge]:
        """Values that `action` defines on `rank`, one entry per rank that reads it."""
        return self._made.get((action.kind, action.stage, rank), [])

    def read_by(self, rank: int, action: Action) -> list[Edge]:
        """Values that `action` waits for on `rank`."""
        return self._read.get((action.kind, action.stage, rank), [])

    def _order_by(self, schedule: Schedule) -> None:
        for row in schedule.ranks:
            for action in row:
                for rank in sorted(self._ranks[action.stage]):
                    for edge in self.made_by(rank, action):
                        key = rank, edge.target, edge.register(action.microbatch)
                        self._sent.setdefault(key, len(self._sent))

    # -- columns -------------------------------------------------------------------------------

    def _add_column(self, column: Column) -> None:
        """Values stay in the column; one message serves all stages of a rank."""
        ranks, stages = column.ranks, column.stages
        numbers = _numbered(stages, ranks)
        values = [stage.graph.by_name() for stage in stages]

        def tag(name: str, target: int) -> int:
            return numbers[name, target] * self._num_microbatches

        def gradient(name: str, consumer: int, producer: int) -> Edge:
            type = values[consumer][name].type
            source, target = ranks[consumer], ranks[producer]
            return Edge(name, consumer, type, source, target, tag(name, ~consumer))

        for stage, rank in zip(stages, ranks, strict=True):
            index = stage.index
            self._made[ActionKind.FORWARD, index, rank] = [
                Edge(name, None, values[consumers[0]][name].type, rank, target, tag(name, target))
                for name, consumers in stage.consumers
                for target in sorted({ranks[consumer] for consumer in consumers})
            ]
            self._read[ActionKind.FORWARD, index, rank] = [
                Edge(name, None, values[index][name].type, ranks[producer], rank, tag(name, rank))
                for name, producer in stage.producers
            ]
            made = [
                gradient(name, index, producer)
                for name, producer in stage.producers
                if values[index][name].requires_grad
            ]
            read = [
                gradient(name, consumer, index)
                for name, consumers in stage.consumers
                if values[index][name].requires_grad
                for consumer in consumers
            ]
            for kind in _BACKWARD:
                self._made[kind, index, rank], self._read[kind, index, rank] = made, read

    # -- stages with meshes of their own -------------------------------------------------------

    def _add_stages(self, columns: tuple[Column, ...], cluster: Cluster) -> None:
        """Rectangles go from the ranks of a stage to those of another, and gradients back."""
        homes: dict[int, list[tuple[int, StageProgram]]] = defaultdict(list)
        for column in columns:
            homes[column.stages[0].index].append((column.ranks[0], column.stages[0]))
        first = [homes[index][0] for index in sorted(homes)]
        numbers = _numbered(tuple(stage for _, stage in first), tuple(rank for rank, _ in first))
        for target, (leader, stage) in enumerate(first):
            values = stage.graph.by_name()
            for name, source in stage.producers:
                have, want = (_parts(homes[index], name) for index in (source, target))
                moves = crossings(cluster, have, want)
                number = numbers[name, leader]
                self._cross(name, None, number, moves, _FORWARD, (source, target))
                if values[name].requires_grad:
                    moves = crossings(cluster, want, have)
                    number = numbers[name, ~target]
                    self._cross(name, target, number, moves, _BACKWARD, (target, source))
        self._end_unread(homes)

    def _cross(
        self,
        name: str,
        consumer: int | None,
        number: int,
        moves: Iterable[Crossing],
        kinds: tuple[ActionKind, ...],
        stages: tuple[int, int],
    ) -> None:
        tag = number * self._num_microbatches
        for move in moves:
            edge = Edge(name, consumer, move.type, move.source, move.target, tag, move.offset)
            for kind in kinds:
                self._made[kind, stages[0], move.source].append(edge)
                self._read[kind, stages[1], move.target].append(edge)

    def _end_unread(self, homes: dict[int, list[tuple[int, StageProgram]]]) -> None:
        """Copies that no rank takes go nowhere, and are freed where they are made."""
        for index, members in homes.items():
            for rank, stage in members:
                values = stage.graph.by_name()
                sent = [(ActionKind.FORWARD, name, None) for name, _ in stage.consumers]
                back = [name for name, _ in stage.producers if values[name].requires_grad]
                for kind, name, consumer in (
                    *sent,
                    *((kind, name, index) for kind in _BACKWARD for name in back),
                ):
                    made = self._made[kind, index, rank]
                    if all(edge.value != name for edge in made):
                        type = dict(_parts([(rank, stage)], name))[rank].part
                        made.append(Edge(name, consumer, type, rank, rank, 0))


def _parts(members: Iterable[tuple[int, StageProgram]], name: str) -> list[tuple[int, TensorShard]]:
    """What each rank of a stage has of the boundary value `name`."""
    return [
        (rank, shard) for rank, stage in members for shard in stage.boundaries if shard.name == name
    ]


def _numbered(
    stages: tuple[StageProgram, ...], ranks: tuple[int, ...]
) -> dict[tuple[str, int], int]:
    """Numbers of transfers: (value, target rank), and (value, ~stage) for that stage's gradient."""
    keys = {
        key
        for stage in stages
        for name, consumers in stage.consumers
        for consumer in consumers
        for key in ((name, ranks[consumer]), (name, ~consumer))
    }
    return {key: number for number, key in enumerate(sorted(keys))}
