"""Deadlock detection: what each step of each rank waits for, and the cycle if none can go on.

Every rank takes its steps in order; a step may wait until another rank has completed a number of
its own. Such a system has one outcome whatever the order of execution, so running it once decides
whether it can end: when no rank can go on and not all are done, the ranks wait for each other in a
cycle. The same waits drawn as edges give `views.event_view`, which is cyclic exactly then.

For programs the waits are those of *unbuffered* sends: a `Send` ends only once its `Recv` is
posted, what reads a received register starts only once its `Send` was reached. A collective ends
once all members have started it; what needs its result starts only then. A computation whose stage
meets other ranks ends once all of them have reached it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..program import (
    Await,
    Backward,
    BackwardInput,
    BackwardWeight,
    ClipGradients,
    Collective,
    Forward,
    Free,
    GradientNorm,
    Instruction,
    OptimizerStep,
    Program,
    Recv,
    Register,
    Send,
)
from ..text import print_instruction
from .registers import Registers

POST = "rank {other} to post the Recv of {subject} from rank {waits}"
SEND = "rank {other} to reach the Send of {subject} to rank {waits}"
REACH = "rank {other} to reach {subject}"
START = "rank {other} to start {subject}"
_COMPUTATIONS = (Forward, Backward, BackwardInput, BackwardWeight)

__all__ = ["Blocked", "Wait", "find_deadlock", "program_waits"]


@dataclass(frozen=True, slots=True)
class Wait:
    """Until `rank` has completed its first `count` steps; `str(reason)` says what for."""

    rank: int
    count: int
    reason: object


@dataclass(frozen=True, slots=True)
class Blocked:
    """A rank that cannot take the step at `position`."""

    rank: int
    position: int
    wait: Wait


def find_deadlock(waits: Sequence[Sequence[tuple[Wait, ...]]]) -> tuple[Blocked, ...]:
    """The cycle of ranks that wait for each other, or nothing if all ranks reach their end.

    Args:
        waits: for each rank, what each of its steps waits for.
    """
    done = [0] * len(waits)

    def holding(rank: int) -> Wait | None:
        for wait in waits[rank][done[rank]]:
            if done[wait.rank] < wait.count:
                return wait
        return None

    waiting: dict[int, list[int]] = {}  # rank -> ranks to try again once it has gone on
    ready = list(range(len(waits)))
    while ready:
        rank = ready.pop()
        before = done[rank]
        while done[rank] < len(waits[rank]):
            wait = holding(rank)
            if wait is not None:
                waiting.setdefault(wait.rank, []).append(rank)
                break
            done[rank] += 1
        if done[rank] > before:
            ready += waiting.pop(rank, [])
    stuck = [rank for rank, steps in enumerate(waits) if done[rank] < len(steps)]
    if not stuck:
        return ()
    chain: list[Blocked] = []
    rank = stuck[0]
    while rank not in [entry.rank for entry in chain]:
        wait = holding(rank)
        assert wait is not None, "a rank that is not stuck is waited for"
        chain.append(Blocked(rank, done[rank], wait))
        rank = wait.rank
    first = [entry.rank for entry in chain].index(rank)
    return tuple(chain[first:])


def program_waits(programs: tuple[Program, ...]) -> list[list[tuple[Wait, ...]]]:
    """What each instruction of each program waits for, under unbuffered sends."""
    registers = Registers(programs)
    ends = _Ends(programs)
    return [
        [
            tuple(ends.waits(registers, program, position))
            for position in range(len(program.instructions))
        ]
        for program in programs
    ]


@dataclass(frozen=True, slots=True)
class _Reason:
    """What rank `waits` needs of rank `other`; rendered only where it is printed."""

    text: str
    waits: int
    other: int
    subject: Register | Instruction

    def __str__(self) -> str:
        subject = self.subject
        name = str(subject) if isinstance(subject, Register) else print_instruction(subject)
        return self.text.format(waits=self.waits, other=self.other, subject=name)


class _Ends:
    """Where the other end of every transfer and collective is."""

    def __init__(self, programs: tuple[Program, ...]) -> None:
        self.sends: dict[tuple[int, int, Register], int] = {}  # (source, target, register)
        self.receives: dict[tuple[int, int, Register], int] = {}
        self.received: dict[tuple[int, Register], list[int]] = {}  # (rank, register) -> sources
        self.collectives: dict[tuple[int, tuple[int, ...]], list[int]] = {}
        self.turns: dict[tuple[int, int], int] = {}  # (rank, position) -> turn in its group
        self.awaited: dict[tuple[int, int], list[int]] = {}  # (rank, position) -> collectives
        self.meetings: dict[tuple[int, int], tuple[int, ...]] = {}  # (rank, stage) -> all ranks
        self.computed: dict[tuple[int, Instruction], int] = {}  # (rank, computation) -> position
        for rank, program in enumerate(programs):
            for stage in program.stages:
                if stage.meets:
                    members = {member for _, ranks in stage.axes for member in ranks}
                    self.meetings[rank, stage.index] = tuple(sorted(members - {rank}))
            self.awaited.update(((rank, at), needed) for at, needed in _awaited(program).items())
            for position, item in enumerate(program.instructions):
                if isinstance(item, _COMPUTATIONS):
                    self.computed[rank, item] = position
                if isinstance(item, Send):
                    self.sends.setdefault((rank, item.peer, item.register), position)
                elif isinstance(item, Recv):
                    self.receives.setdefault((item.peer, rank, item.register), position)
                    self.received.setdefault((rank, item.register), []).append(item.peer)
                elif isinstance(item, Collective):
                    turns = self.collectives.setdefault((rank, tuple(sorted(item.ranks))), [])
                    self.turns[rank, position] = len(turns)
                    turns.append(position)

    def waits(self, registers: Registers, program: Program, position: int) -> Iterator[Wait]:
        rank, item = program.rank, program.instructions[position]
        if isinstance(item, Send):
            posted = self.receives.get((rank, item.peer, item.register))
            if posted is not None:
                yield Wait(item.peer, posted + 1, _Reason(POST, rank, item.peer, item.register))
        elif isinstance(item, _COMPUTATIONS):
            for member in self.meetings.get((rank, item.stage), ()):
                reached = self.computed.get((member, item))
                if reached is not None:
                    yield Wait(member, reached, _Reason(REACH, rank, member, item))
        for started in self.awaited.get((rank, position), ()):
            yield from self._starts(program, started)
        read = item.registers if isinstance(item, Free) else registers.reads(item)
        for register in read:
            for source in self.received.get((rank, register), ()):
                sent = self.sends.get((source, rank, register))
                if sent is not None:
                    yield Wait(source, sent, _Reason(SEND, rank, source, register))

    def _starts(self, program: Program, position: int) -> Iterator[Wait]:
        """Until the other members have started the collective at `position`."""
        item = program.instructions[position]
        assert isinstance(item, Collective)
        turn = self.turns[program.rank, position]
        for member in item.ranks:
            others = self.collectives.get((member, tuple(sorted(item.ranks))), ())
            if member != program.rank and turn < len(others):
                reason = _Reason(START, program.rank, member, item)
                yield Wait(member, others[turn] + 1, reason)


def _awaited(program: Program) -> dict[int, list[int]]:
    """Positions of the collectives whose results each instruction is the first to need."""
    table: dict[int, list[int]] = {}
    pending: list[tuple[int, Collective]] = []
    for position, item in enumerate(program.instructions):
        needed: list[tuple[int, Collective]] = []
        if isinstance(item, GradientNorm | ClipGradients | OptimizerStep):
            needed = pending
        elif isinstance(item, Collective | Await):
            needed = [entry for entry in pending if set(entry[1].targets) & set(item.targets)]
        if needed:
            table[position] = [at for at, _ in needed]
            pending = [entry for entry in pending if entry not in needed]
        if isinstance(item, Collective):
            pending.append((position, item))
    return table
