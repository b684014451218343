"""Lower stage graphs and a schedule to one instruction list per rank.

Before an action computes, the receives of the *next* action that has any are posted, so that data
travels while the device computes; on a rank with several stages those of as many actions, so that
a whole round of them has its data on the way. They are posted earlier where two ranks could else
wait for each other (see `receives.py`), and where another value that its sender sends later is
needed before: between two ranks, transfers keep their order. Results are sent at once after the
action that makes them; input gradients leave before weight gradients are computed. Registers are
freed after their last reader.

Every column of the in-stage mesh runs the same schedule, as do all ranks of a stage that has a mesh
of its own; `edges.py` has what they send to whom. The sums of gradients and what follows the
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
)
from ..ir.schedule import Action, ActionKind
from .columns import Column, make_columns
from .copies import parameter_copies
from .edges import Edges
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
            stage_ranks=() if plan.is_mixed else columns[0].ranks,
            instructions=(),
            plan_hash=plan_hash,
            memory_limit_bytes=plan.cluster.type_of(rank).memory_bytes,
        )
        for rank in range(num_ranks)
    ]
    edges = Edges.of(columns, plan.cluster, plan.num_microbatches, plan.schedule)
    for column in columns:
        for rank in sorted(set(column.ranks)):
            programs[rank] = _with_column(programs[rank], column, plan, edges, tail)
    return post_receives_early(tuple(programs))


def _with_column(
    program: Program, column: Column, plan: Plan, edges: Edges, tail: Tail | None
) -> Program:
    """The program of a rank of `column`: the schedule is for the first rank of each stage."""
    assert plan.schedule is not None
    rank = program.rank
    homes = zip(column.ranks, column.stages, strict=True)
    stages = tuple(stage for home, stage in homes if home == rank)
    actions = plan.schedule.ranks[plan.stages[stages[0].index].device]
    program = replace(
        program,
        stages=stages,
        stage_ranks=() if plan.is_mixed else column.ranks,
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


def _instructions(
    rank: int,
    actions: tuple[Action, ...],
    edges: Edges,
    closing: Mapping[int, _Closing],
) -> Iterator[Instruction]:
    """`closing`: by position, of the actions that end a stage."""
    receives = _receives_by_action(actions, edges, rank)
    ahead = len({action.stage for action in actions if edges.read_by(rank, action)})
    ahead = ahead if all(action.kind is ActionKind.FORWARD for action in actions) else 1
    last_read = {
        edge.register(action.microbatch): position
        for position, action in enumerate(actions)
        for edge in edges.read_by(rank, action)
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
        for edge in edges.made_by(rank, action):
            register = edge.register(action.microbatch)
            if edge.target != rank:
                tag = edge.first_tag + action.microbatch
                yield Send(register, edge.target, tag, edge.type, edge.offset)
            if register not in last_read:
                dead.append(register)
        read = [edge.register(action.microbatch) for edge in edges.read_by(rank, action)]
        dead += [register for register in read if last_read[register] == position]
        if dead:
            yield Free(tuple(dict.fromkeys(dead)))
        yield from end.instructions


def _receives_by_action(actions: tuple[Action, ...], edges: Edges, rank: int) -> list[list[Recv]]:
    """Receives that each action needs and no earlier action of this rank has posted, and before
    them those of what the same ranks send before."""
    seen: set[tuple[int, Register]] = set()
    table: list[list[Recv]] = []
    for action in actions:
        posts = []
        for edge in edges.read_by(rank, action):
            register = edge.register(action.microbatch)
            if edge.source != rank and (edge.source, register) not in seen:
                seen.add((edge.source, register))
                tag = edge.first_tag + action.microbatch
                posts.append(Recv(register, edge.source, tag, edge.type, edge.offset))
        table.append(posts)
    return _in_order_of_sends(table, edges, rank)


def _in_order_of_sends(table: list[list[Recv]], edges: Edges, rank: int) -> list[list[Recv]]:
    waiting: dict[int, list[Recv]] = defaultdict(list)
    for item in (item for posts in table for item in posts):
        waiting[item.peer].append(item)
    for items in waiting.values():
        items.sort(key=lambda item: edges.turn(item.peer, rank, item.register), reverse=True)
    done: set[tuple[int, Register]] = set()
    ordered: list[list[Recv]] = []
    for posts in table:
        moved = []
        for item in posts:
            while (item.peer, item.register) not in done:
                moved.append(waiting[item.peer].pop())
                done.add((item.peer, moved[-1].register))
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
