"""Lower stage graphs and a schedule to one instruction list per rank.

Before an action computes, the receives of the *next* action that has any are posted, so that data
travels while the device computes; on a rank with several stages those of as many actions, so that
a whole round of them has its data on the way. They are posted earlier where two ranks could else
wait for each other (see `receives.py`), and where another value that its sender sends later is
needed before: between two ranks, transfers keep their order. Results are sent at once after the
action that makes them; input gradients leave before weight gradients are computed. Registers are
freed after their last reader.

Every column of the in-stage mesh runs the same schedule. The sums of gradients and what follows the
last action are in `tail.py`; the last weight gradients of a stage are computed in parts, after each
of which the sums start that it has made possible.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from ..ir.graph import Graph, Mode, ValueKind
from ..ir.plan import Plan
from ..ir.program import (
    Backward,
    BackwardInput,
    BackwardWeight,
    Forward,
    Free,
    Instruction,
    Program,
    Recv,
    Register,
    Send,
    StageProgram,
)
from ..ir.schedule import Action, ActionKind, Schedule
from ..ir.types import TensorType
from .columns import Column, make_columns
from .copies import parameter_copies
from .receives import post_receives_early
from .tail import Tail

__all__ = ["generate_programs"]


def generate_programs(
    graph: Graph,
    plan: Plan,
    *,
    plan_hash: str,
    clip_grad_norm: float | None = None,
    num_ranks: int | None = None,
) -> tuple[Program, ...]:
    """One program per rank, in rank order.

    Args:
        graph: the captured graph, at microbatch shape.
        plan: stages and schedule are read.
        plan_hash: stored in every program; ranks agree on it before the first step.
        clip_grad_norm: clip the global gradient norm to this before the optimizer step.
        num_ranks: ranks of the job (those without a stage get empty programs); None: up to the
            last one with a stage.
    """
    assert plan.schedule is not None, "plan without a schedule"
    columns = make_columns(graph, plan)
    num_ranks = num_ranks or 1 + max(rank for column in columns for rank in column.ranks)
    tail = None
    if graph.mode is Mode.TRAIN:
        active = tuple(sorted({rank for column in columns for rank in column.ranks}))
        tail = Tail(parameter_copies(graph, plan, columns), active, clip_grad_norm)
    programs = [
        Program(
            rank=rank,
            num_ranks=num_ranks,
            mode=graph.mode,
            num_microbatches=plan.num_microbatches,
            stages=(),
            stage_ranks=columns[0].ranks,
            instructions=(),
            plan_hash=plan_hash,
            memory_limit_bytes=plan.cluster.type_of(rank).memory_bytes,
        )
        for rank in range(num_ranks)
    ]
    for column in columns:
        edges = _Edges(column.stages, column.ranks, plan.num_microbatches)
        edges.order_by(plan.schedule)
        for rank in sorted(set(column.ranks)):
            programs[rank] = _with_column(programs[rank], column, plan, edges, tail)
    return post_receives_early(tuple(programs))


def _with_column(
    program: Program, column: Column, plan: Plan, edges: _Edges, tail: Tail | None
) -> Program:
    """The program of a rank of `column`, which runs the first column's schedule."""
    assert plan.schedule is not None
    rank = program.rank
    position = column.ranks.index(rank)
    actions = plan.schedule.ranks[plan.stages[position].device]
    program = replace(
        program,
        stages=tuple(stage for stage in column.stages if column.ranks[stage.index] == rank),
        stage_ranks=column.ranks,
        shards=column.shards_of(rank),
    )
    if tail is None:
        return replace(program, instructions=tuple(_instructions(rank, actions, edges, {})))
    completed = _completed(program, actions)
    parts = {position: tail.parts(rank, names) for position, names in completed.items()}
    closing = {
        position: _closing(tail, rank, actions[position], names, parts[position])
        for position, names in completed.items()
    }
    of_stage = {actions[position].stage: found for position, found in parts.items()}
    program = replace(
        program,
        stages=tuple(
            replace(stage, parts=of_stage.get(stage.index, ())) for stage in program.stages
        ),
    )
    instructions = (*_instructions(rank, actions, edges, closing), *tail.instructions(rank))
    return replace(
        program,
        instructions=tuple(tail.bounded(rank, instructions)),
        updates=tail.updates(rank),
        gradient_terms=tail.terms(rank),
        offloaded=tail.offloaded(rank),
    )


def _completed(program: Program, actions: tuple[Action, ...]) -> dict[int, list[str]]:
    """Position of an action -> the parameters whose gradients nothing adds to after it."""
    last = {
        action.stage: position
        for position, action in enumerate(actions)
        if action.kind in (ActionKind.BACKWARD, ActionKind.BACKWARD_WEIGHT)
    }
    ends: dict[str, int] = {}
    for stage in program.stages:
        for value in stage.graph.values_of(ValueKind.PARAMETER):
            if value.requires_grad:
                ends[value.origin] = max(ends.get(value.origin, 0), last[stage.index])
    table: dict[int, list[str]] = {}
    for name, position in ends.items():
        table.setdefault(position, []).append(name)
    return table


@dataclass(frozen=True, slots=True)
class _Closing:
    """The end of a stage's last backward: what follows it, the weight gradients among that if they
    are computed in parts."""

    instructions: tuple[Instruction, ...]
    in_parts: bool


def _closing(
    tail: Tail, rank: int, action: Action, names: list[str], parts: tuple[tuple[str, ...], ...]
) -> _Closing:
    if not parts:
        return _Closing(tuple(tail.after_part(rank, names)), False)
    instructions: list[Instruction] = []
    for number, part in enumerate(parts):
        instructions.append(BackwardWeight(action.stage, action.microbatch, number))
        instructions += tail.after_part(rank, part)
    return _Closing(tuple(instructions), True)


@dataclass(frozen=True, slots=True)
class _Edge:
    """A value that one stage's action makes and another rank's (or stage's) reads.

    `consumer` is set for gradients. Tags of the microbatches are `first_tag`, `first_tag + 1`, ...
    """

    value: str
    consumer: int | None
    type: TensorType
    source: int
    target: int
    first_tag: int

    def register(self, microbatch: int) -> Register:
        return Register(self.value, microbatch, self.consumer)


class _Edges:
    """Which values each kind of action of each stage makes and reads."""

    def __init__(
        self, stages: tuple[StageProgram, ...], ranks: tuple[int, ...], num_microbatches: int
    ) -> None:
        self._ranks = ranks
        self._num_microbatches = num_microbatches
        self._values = [stage.graph.by_name() for stage in stages]
        self._numbers = _numbered(stages, ranks)
        self._made: dict[tuple[ActionKind, int], list[_Edge]] = {}
        self._read: dict[tuple[ActionKind, int], list[_Edge]] = {}
        self._sent: dict[tuple[int, Register], int] = {}  # (target, register) -> turn
        for stage in stages:
            self._add_stage(stage)

    def order_by(self, schedule: Schedule) -> None:
        """Note in which order ranks send."""
        for row in schedule.ranks:
            for action in row:
                for edge in self.made_by(action):
                    key = edge.target, edge.register(action.microbatch)
                    self._sent.setdefault(key, len(self._sent))

    def turn(self, target: int, register: Register) -> int:
        """Place of a message among all that its sender sends."""
        return self._sent[target, register]

    def made_by(self, action: Action) -> list[_Edge]:
        """Values that `action` defines, one entry per rank that reads it."""
        return self._made.get((action.kind, action.stage), [])

    def read_by(self, action: Action) -> list[_Edge]:
        """Values that `action` waits for."""
        return self._read.get((action.kind, action.stage), [])

    def _add_stage(self, stage: StageProgram) -> None:
        index = stage.index
        forward = ActionKind.FORWARD
        self._made[forward, index] = [
            self._value_edge(index, name, target, consumers)
            for name, consumers in stage.consumers
            for target in sorted({self._ranks[consumer] for consumer in consumers})
        ]
        self._read[forward, index] = [
            self._value_edge(producer, name, self._ranks[index], (index,))
            for name, producer in stage.producers
        ]
        made = [
            self._gradient_edge(index, name, index, producer)
            for name, producer in stage.producers
            if self._values[index][name].requires_grad
        ]
        read = [
            self._gradient_edge(index, name, consumer, index)
            for name, consumers in stage.consumers
            if self._values[index][name].requires_grad
            for consumer in consumers
        ]
        for kind in (ActionKind.BACKWARD, ActionKind.BACKWARD_INPUT):
            self._made[kind, index], self._read[kind, index] = made, read

    def _value_edge(
        self, producer: int, name: str, target: int, consumers: tuple[int, ...]
    ) -> _Edge:
        """The value `name` on its way to rank `target`; one message serves all stages there."""
        number = self._numbers[name, target]
        return _Edge(
            value=name,
            consumer=None,
            type=self._values[consumers[0]][name].type,
            source=self._ranks[producer],
            target=target,
            first_tag=number * self._num_microbatches,
        )

    def _gradient_edge(self, stage: int, name: str, consumer: int, producer: int) -> _Edge:
        """The gradient of `name` that stage `consumer` contributes."""
        number = self._numbers[name, ~consumer]
        return _Edge(
            value=name,
            consumer=consumer,
            type=self._values[stage][name].type,
            source=self._ranks[consumer],
            target=self._ranks[producer],
            first_tag=number * self._num_microbatches,
        )


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


def _instructions(
    rank: int,
    actions: tuple[Action, ...],
    edges: _Edges,
    closing: Mapping[int, _Closing],
) -> Iterator[Instruction]:
    """`closing`: by position, of the actions that end a stage."""
    receives = _receives_by_action(actions, edges, rank)
    ahead = len({action.stage for action in actions if edges.read_by(action)})
    ahead = ahead if all(action.kind is ActionKind.FORWARD for action in actions) else 1
    last_read = {
        edge.register(action.microbatch): position
        for position, action in enumerate(actions)
        for edge in edges.read_by(action)
    }
    pending = [position for position, posts in enumerate(receives) if posts]
    pending.reverse()
    if pending and pending[-1] == 0:
        yield from receives[pending.pop()]
    posted: list[int] = []  # for actions to come
    for position, action in enumerate(actions):
        posted = [place for place in posted if place > position]
        while pending and len(posted) < ahead:
            posted.append(pending.pop())
            yield from receives[posted[-1]]
        end = closing.get(position, _Closing((), False))
        yield from _compute(action, without_weights=end.in_parts)
        dead = []
        for edge in edges.made_by(action):
            register = edge.register(action.microbatch)
            if edge.target != rank:
                yield Send(register, edge.target, edge.first_tag + action.microbatch, edge.type)
            if register not in last_read:
                dead.append(register)
        read = [edge.register(action.microbatch) for edge in edges.read_by(action)]
        dead += [register for register in read if last_read[register] == position]
        if dead:
            yield Free(tuple(dict.fromkeys(dead)))
        yield from end.instructions


def _receives_by_action(actions: tuple[Action, ...], edges: _Edges, rank: int) -> list[list[Recv]]:
    """Receives that each action needs and no earlier action of this rank has posted, and before
    them those of what the same ranks send before."""
    seen: set[Register] = set()
    table: list[list[Recv]] = []
    for action in actions:
        posts = []
        for edge in edges.read_by(action):
            register = edge.register(action.microbatch)
            if edge.source != rank and register not in seen:
                seen.add(register)
                tag = edge.first_tag + action.microbatch
                posts.append(Recv(register, edge.source, tag, edge.type))
        table.append(posts)
    return _in_order_of_sends(table, edges, rank)


def _in_order_of_sends(table: list[list[Recv]], edges: _Edges, rank: int) -> list[list[Recv]]:
    waiting: dict[int, list[Recv]] = defaultdict(list)
    for item in (item for posts in table for item in posts):
        waiting[item.peer].append(item)
    for items in waiting.values():
        items.sort(key=lambda item: edges.turn(rank, item.register), reverse=True)
    done: set[Register] = set()
    ordered: list[list[Recv]] = []
    for posts in table:
        moved = []
        for item in posts:
            while item.register not in done:
                moved.append(waiting[item.peer].pop())
                done.add(moved[-1].register)
        ordered.append(moved)
    return ordered


_INSTRUCTIONS: dict[ActionKind, Callable[[int, int], Instruction]] = {
    ActionKind.FORWARD: Forward,
    ActionKind.BACKWARD: Backward,
    ActionKind.BACKWARD_INPUT: BackwardInput,
    ActionKind.BACKWARD_WEIGHT: BackwardWeight,
}


def _compute(action: Action, *, without_weights: bool) -> Iterator[Instruction]:
    kind = action.kind
    if without_weights:
        if kind is ActionKind.BACKWARD_WEIGHT:
            return
        kind = ActionKind.BACKWARD_INPUT
    yield _INSTRUCTIONS[kind](action.stage, action.microbatch)
