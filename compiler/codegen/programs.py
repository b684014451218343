"""Lower stage graphs and a schedule to one instruction list per rank.

Before an action computes, the receives of the *next* action that has any are posted, so that data
travels while the device computes; earlier where two ranks could else wait for each other (see
`receives.py`). Results are sent at once after the action that makes them; input gradients leave
before weight gradients are computed. Registers are freed after their last reader.

After the last action: sum the gradients of parameters held by several ranks, then (if asked for)
the global gradient norm, clipping, and the optimizer step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ..ir.graph import Graph, Mode, Value, ValueKind
from ..ir.plan import Plan
from ..ir.program import (
    GRADIENT_NORM,
    AllReduce,
    Backward,
    BackwardInput,
    BackwardWeight,
    ClipGradients,
    Forward,
    Free,
    GradientNorm,
    Instruction,
    OptimizerStep,
    Program,
    Recv,
    Register,
    Send,
    StageProgram,
)
from ..ir.schedule import Action, ActionKind, Schedule
from ..ir.types import TensorType
from .cut import cut_stages, parameter_stages
from .receives import post_receives_early

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
    stages = cut_stages(graph, plan.stages)
    ranks = tuple(stage.device for stage in plan.stages)
    edges = _Edges(stages, ranks, plan.num_microbatches)
    num_ranks = num_ranks or max(ranks) + 1
    tail = _Tail(stages, ranks, clip_grad_norm) if graph.mode is Mode.TRAIN else None
    programs = tuple(
        Program(
            rank=rank,
            num_ranks=num_ranks,
            mode=graph.mode,
            num_microbatches=plan.num_microbatches,
            stages=tuple(stage for stage in stages if ranks[stage.index] == rank),
            stage_ranks=ranks,
            instructions=tuple(_instructions(rank, plan.schedule, edges, tail)),
            plan_hash=plan_hash,
            memory_limit_bytes=plan.cluster.type_of(rank).memory_bytes,
        )
        for rank in range(num_ranks)
    )
    return post_receives_early(programs)


@dataclass(frozen=True, slots=True)
class _Transfer:
    """A register, where it is made and where it is read."""

    register: Register
    type: TensorType
    source: int
    target: int


class _Edges:
    """Which registers each action makes and reads, and their tags."""

    def __init__(
        self, stages: tuple[StageProgram, ...], ranks: tuple[int, ...], num_microbatches: int
    ) -> None:
        self.ranks = ranks
        self.num_microbatches = num_microbatches
        self._stages = stages
        self._types = [stage.graph.by_name() for stage in stages]
        names = sorted(
            {
                (name, consumer)
                for stage in stages
                for name, consumers in stage.consumers
                for consumer in consumers
            }
        )
        self._edge_number = {edge: number for number, edge in enumerate(names)}

    def tag(self, transfer: _Transfer) -> int:
        """Unique per register and direction within a step."""
        register = transfer.register
        if register.consumer is None:
            consumer = min(
                stage
                for (name, stage) in self._edge_number
                if name == register.value and self.ranks[stage] == transfer.target
            )
            edge, direction = self._edge_number[register.value, consumer], 0
        else:
            edge, direction = self._edge_number[register.value, register.consumer], 1
        return (edge * 2 + direction) * self.num_microbatches + register.microbatch

    def made_by(self, action: Action) -> list[_Transfer]:
        """Registers that `action` defines, one entry per rank that reads it."""
        stage = self._stages[action.stage]
        here = self.ranks[action.stage]
        if action.kind is ActionKind.FORWARD:
            return [
                _Transfer(
                    Register(name, action.microbatch), self._type(action.stage, name), here, rank
                )
                for name, consumers in stage.consumers
                for rank in sorted({self.ranks[consumer] for consumer in consumers})
            ]
        if action.kind is ActionKind.BACKWARD_WEIGHT:
            return []
        return [
            _Transfer(
                Register(name, action.microbatch, consumer=action.stage),
                self._type(action.stage, name),
                here,
                self.ranks[producer],
            )
            for name, producer in stage.producers
            if self._value(action.stage, name).requires_grad
        ]

    def read_by(self, action: Action) -> list[_Transfer]:
        """Registers that `action` waits for."""
        stage = self._stages[action.stage]
        here = self.ranks[action.stage]
        if action.kind is ActionKind.FORWARD:
            return [
                _Transfer(
                    Register(name, action.microbatch),
                    self._type(action.stage, name),
                    self.ranks[producer],
                    here,
                )
                for name, producer in stage.producers
            ]
        if action.kind is ActionKind.BACKWARD_WEIGHT:
            return []
        return [
            _Transfer(
                Register(name, action.microbatch, consumer=consumer),
                self._type(action.stage, name),
                self.ranks[consumer],
                here,
            )
            for name, consumers in stage.consumers
            if self._value(action.stage, name).requires_grad
            for consumer in consumers
        ]

    def _value(self, stage: int, name: str) -> Value:
        return self._types[stage][name]

    def _type(self, stage: int, name: str) -> TensorType:
        return self._types[stage][name].type


def _instructions(
    rank: int, schedule: Schedule, edges: _Edges, tail: _Tail | None
) -> Iterator[Instruction]:
    actions = schedule.ranks[rank] if rank < len(schedule.ranks) else ()
    receives = _receives_by_action(actions, edges, rank)
    last_read = {
        transfer.register: position
        for position, action in enumerate(actions)
        for transfer in edges.read_by(action)
    }
    pending = [position for position, posts in enumerate(receives) if posts]
    posted_for = -1
    if pending and pending[0] == 0:
        posted_for = pending.pop(0)
        yield from receives[posted_for]
    for position, action in enumerate(actions):
        if pending and posted_for <= position:
            posted_for = pending.pop(0)
            yield from receives[posted_for]
        yield _compute(action)
        made = edges.made_by(action)
        for transfer in made:
            if transfer.target != rank:
                yield Send(transfer.register, transfer.target, edges.tag(transfer), transfer.type)
        dead = {t.register for t in edges.read_by(action) if last_read[t.register] == position}
        dead |= {t.register for t in made if t.register not in last_read}
        if dead:
            yield Free(tuple(sorted(dead, key=str)))
    if tail is not None and rank in tail.all_ranks:
        yield from tail.instructions(rank)


def _receives_by_action(actions: tuple[Action, ...], edges: _Edges, rank: int) -> list[list[Recv]]:
    """Receives that each action needs and no earlier action of this rank has posted."""
    seen: set[Register] = set()
    table: list[list[Recv]] = []
    for action in actions:
        posts = []
        for transfer in edges.read_by(action):
            if transfer.source != rank and transfer.register not in seen:
                seen.add(transfer.register)
                posts.append(
                    Recv(transfer.register, transfer.source, edges.tag(transfer), transfer.type)
                )
        table.append(posts)
    return table


def _compute(action: Action) -> Instruction:
    kinds: dict[ActionKind, Callable[[int, int], Instruction]] = {
        ActionKind.FORWARD: Forward,
        ActionKind.BACKWARD: Backward,
        ActionKind.BACKWARD_INPUT: BackwardInput,
        ActionKind.BACKWARD_WEIGHT: BackwardWeight,
    }
    return kinds[action.kind](action.stage, action.microbatch)


class _Tail:
    """What follows the last action of a training step."""

    def __init__(
        self, stages: tuple[StageProgram, ...], ranks: tuple[int, ...], clip: float | None
    ) -> None:
        holders: dict[str, tuple[int, ...]] = {}
        for name, found in parameter_stages(stages).items():
            holders[name] = tuple(sorted({ranks[stage] for stage in found}))
        self.trained = {
            value.origin
            for stage in stages
            for value in stage.graph.values_of(ValueKind.PARAMETER)
            if value.requires_grad
        }
        self.holders = {name: holders[name] for name in sorted(holders) if name in self.trained}
        self.all_ranks = tuple(sorted(set(ranks)))
        self.clip = clip

    def instructions(self, rank: int) -> Iterator[Instruction]:
        for name, ranks in self.holders.items():
            if len(ranks) > 1 and rank in ranks:
                yield AllReduce(name, ranks)
        if self.clip is not None:
            yield GradientNorm(
                tuple(name for name, ranks in self.holders.items() if ranks[0] == rank)
            )
            if len(self.all_ranks) > 1:
                yield AllReduce(GRADIENT_NORM, self.all_ranks)
            yield ClipGradients(self.clip)
        yield OptimizerStep()
