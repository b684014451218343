"""Discrete-event simulation of one step: programs and a cluster to a timeline.

Every rank executes its instructions in order on one compute stream. A transfer starts when its
`Send` was executed, its `Recv` is posted (sends are taken as unbuffered) and earlier transfers
between the two ranks in that direction are done; it takes alpha-beta time beside computation. A
compute instruction waits for the transfers of what it reads. A collective starts when all its ranks
have reached it and earlier ones of theirs are done, takes ring time beside computation, and is
waited for where its result is needed. Durations are those of the cost model unless measured
ones are given.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from ..compiler.ir.cluster import Cluster
from ..compiler.ir.errors import VerificationError
from ..compiler.ir.graph import OutputKind, ValueKind
from ..compiler.ir.plan import OptimizerModel
from ..compiler.ir.program import (
    AllGather,
    AllReduce,
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
    ReduceScatter,
    Register,
    Send,
    StageProgram,
)
from ..compiler.ir.trace import Lane, TraceEvent, event_name
from ..compiler.ir.types import TensorType
from .collectives import Network
from .links import all_gather_seconds, all_reduce_seconds, reduce_scatter_seconds
from .memory_curve import MemoryCurve
from .stages import StageSeconds, optimizer_seconds, part_shares, stage_seconds

__all__ = ["Simulation", "Span", "simulate"]


@dataclass(frozen=True, slots=True)
class Span:
    """Something a rank did: `kind` is F, B, I, W, `sync` or `optimizer`; seconds from the start."""

    rank: int
    kind: str
    stage: int
    microbatch: int
    begin_seconds: float
    end_seconds: float


@dataclass(frozen=True, slots=True)
class Simulation:
    """Predicted course of one step.

    Args:
        step_seconds: until the last rank is done.
        bubble_fraction: share of all ranks' time in which they do not compute.
        busy_fraction: per rank, the share of the step in which it computes.
        link_bytes: ((source rank, target rank), bytes sent), sorted.
        peak_memory_bytes: per rank.
        memory_curves: per rank, (seconds, bytes) whenever the level changes.
        timeline: spans in order of rank and time.
        events: the same and all communication, in the form of a measured trace.
    """

    step_seconds: float
    bubble_fraction: float
    busy_fraction: tuple[float, ...]
    link_bytes: tuple[tuple[tuple[int, int], int], ...]
    peak_memory_bytes: tuple[int, ...]
    memory_curves: tuple[tuple[tuple[float, int], ...], ...]
    timeline: tuple[Span, ...]
    events: tuple[TraceEvent, ...] = ()


_Computation = Forward | Backward | BackwardInput | BackwardWeight
_SECONDS: dict[type, Callable[[Cluster, Sequence[int], float], float]] = {
    AllReduce: all_reduce_seconds,
    ReduceScatter: reduce_scatter_seconds,
    AllGather: all_gather_seconds,
}
_DEFAULT_OPTIMIZER = OptimizerModel("adamw", 2.0)


def simulate(
    programs: Sequence[Program],
    *,
    cluster: Cluster,
    optimizer: OptimizerModel = _DEFAULT_OPTIMIZER,
    measured: Mapping[int, StageSeconds] | None = None,
) -> Simulation:
    """Simulate one step of `programs` (one per rank; rank r runs on device r of `cluster`).

    Args:
        optimizer: what `OptimizerStep` costs and its states occupy.
        measured: by stage, seconds that replace the predicted ones.

    Raises:
        VerificationError: the programs cannot run to their end (a rank waits for ever).
    """
    run = _Run(programs, cluster, optimizer, measured or {})
    while any(rank.position < len(rank.program.instructions) for rank in run.ranks):
        if not any(run.advance(rank) for rank in run.ranks):
            raise _stuck(run)
    for rank in run.ranks:
        run.wait(rank, None)
    return run.result()


def _stuck(run: _Run) -> VerificationError:
    lines = [
        f"rank {rank.program.rank} waits at {rank.program.instructions[rank.position]}"
        for rank in run.ranks
        if rank.position < len(rank.program.instructions)
    ]
    return VerificationError(
        f"the programs do not run to their end: {'; '.join(lines)}",
        ways_out=("generate the programs again from the plan",),
    )


@dataclass(slots=True, eq=False)
class _Meeting:
    """A collective: when its ranks reached it, and its end once all have."""

    item: Collective
    reached: dict[int, float] = field(default_factory=dict)
    end_seconds: float | None = None


@dataclass(slots=True)
class _Rank:
    program: Program
    memory: MemoryCurve
    position: int = 0
    seconds: float = 0.0
    busy_seconds: float = 0.0
    meetings: list[_Meeting] = field(default_factory=list)  # started, not waited for yet
    wire_free_seconds: float = 0.0  # from when on it can take part in the next collective


class _Run:
    """State of one simulation."""

    def __init__(
        self,
        programs: Sequence[Program],
        cluster: Cluster,
        optimizer: OptimizerModel,
        measured: Mapping[int, StageSeconds],
    ) -> None:
        self.cluster = cluster
        self.optimizer = optimizer
        self.stages: dict[tuple[int, int], StageProgram] = {}  # by (rank, stage)
        self.seconds: dict[tuple[int, int], StageSeconds] = {}
        self.shares: dict[tuple[int, int], tuple[float, ...]] = {}  # parts of weight gradients
        for program in programs:
            device_type = cluster.type_of(program.rank)
            for stage in program.stages:
                key = program.rank, stage.index
                self.stages[key] = stage
                network = Network(cluster, stage.axes)
                self.seconds[key] = measured.get(stage.index) or stage_seconds(
                    stage.graph, device_type, recomputed=stage.recomputed, network=network
                )
                self.shares[key] = part_shares(stage, device_type, network)
        self.ranks = [
            _Rank(program, MemoryCurve(program, optimizer, cluster.type_of(program.rank).backend))
            for program in programs
        ]
        self.spans: list[Span] = []
        self.events: list[TraceEvent] = []
        self.link_bytes: dict[tuple[int, int], int] = defaultdict(int)
        self._sent: dict[tuple[int, int, int], tuple[float, Send]] = {}
        self._posted: dict[tuple[int, int, int], tuple[float, Recv]] = {}
        self._link_free: dict[tuple[int, int], float] = defaultdict(float)
        self._arrival: dict[tuple[int, Register], float] = {}
        self._meetings: dict[tuple[int, ...], list[_Meeting]] = defaultdict(list)
        self._turns: dict[tuple[int, tuple[int, ...]], int] = defaultdict(int)

    def advance(self, rank: _Rank) -> bool:
        """Execute instructions of `rank` until it has to wait; whether any was executed."""
        began = rank.position
        while rank.position < len(rank.program.instructions):
            if not self._execute(rank, rank.program.instructions[rank.position]):
                break
            rank.position += 1
        return rank.position > began

    def _execute(self, rank: _Rank, instruction: Instruction) -> bool:
        if not self.wait(rank, instruction):
            return False
        began = rank.seconds
        match instruction:
            case Forward() | Backward() | BackwardInput() | BackwardWeight():
                return self._compute(rank, instruction)
            case Send():
                self._sent[rank.program.rank, instruction.peer, instruction.tag] = (
                    rank.seconds,
                    instruction,
                )
                self._start_transfer((rank.program.rank, instruction.peer, instruction.tag))
            case Recv():
                key = (instruction.peer, rank.program.rank, instruction.tag)
                self._posted[key] = (rank.seconds, instruction)
                self._arrival.setdefault((rank.program.rank, instruction.register), -1.0)
                rank.memory.define(instruction.register, instruction.type, rank.seconds)
                self._start_transfer(key)
            case Free():
                rank.memory.free(instruction.registers, rank.seconds)
            case AllReduce() | ReduceScatter() | AllGather():
                self._start(rank, instruction)
            case GradientNorm() | ClipGradients():
                held = rank.memory.held
                self._sweep(rank, "sync", sum((*held.updated_bytes, *held.offloaded_bytes)))
                self._event(rank.program.rank, Lane.COMPUTE, instruction, began, rank.seconds)
            case OptimizerStep():
                self._optimizer_step(rank)
                self._event(rank.program.rank, Lane.COMPUTE, instruction, began, rank.seconds)
        return True

    def _start_transfer(self, key: tuple[int, int, int]) -> None:
        """Let a transfer run once both its ends are known."""
        if key not in self._sent or key not in self._posted:
            return
        pair = key[:2]
        sent, send = self._sent[key]
        posted, recv = self._posted[key]
        link = self.cluster.link(*pair)
        begin = max(sent, posted, self._link_free[pair])
        size = send.type.num_bytes
        self._link_free[pair] = begin + size / link.bytes_per_second
        self._arrival[pair[1], recv.register] = begin + link.seconds(size)
        self.link_bytes[pair] += size
        end = self._arrival[pair[1], recv.register]
        self._event(pair[0], Lane.COMMUNICATION, send, begin, end)
        self._event(pair[1], Lane.COMMUNICATION, recv, begin, end)

    def _compute(self, rank: _Rank, action: _Computation) -> bool:
        stage = self.stages[rank.program.rank, action.stage]
        reads = _reads(stage, action)
        arrivals = [
            self._arrival[rank.program.rank, register]
            for register in reads
            if (rank.program.rank, register) in self._arrival
        ]
        if any(arrival < 0 for arrival in arrivals):
            return False
        begin = max([rank.seconds, *arrivals])
        seconds = self.seconds[rank.program.rank, action.stage]
        kind, length = {
            Forward: ("F", seconds.forward),
            Backward: ("B", seconds.backward),
            BackwardInput: ("I", seconds.backward_input),
            BackwardWeight: ("W", seconds.backward_weight),
        }[type(action)]
        part = action.part if isinstance(action, BackwardWeight) else None
        if part is not None:
            length *= self.shares[rank.program.rank, action.stage][part]
        self._span(rank, kind, action.stage, action.microbatch, begin, begin + length)
        self._event(rank.program.rank, Lane.COMPUTE, action, begin, begin + length)
        rank.memory.action(kind, action.stage, part, begin, begin + length)
        for register, value_type in _writes(stage, action):
            rank.memory.define(register, value_type, begin + length)
        return True

    def _start(self, rank: _Rank, item: Collective) -> None:
        """`rank` reaches a collective; the last one to reach it settles when it ends."""
        group = tuple(sorted(item.ranks))
        turn = self._turns[rank.program.rank, group]
        self._turns[rank.program.rank, group] += 1
        if turn == len(self._meetings[group]):
            self._meetings[group].append(_Meeting(item))
        meeting = self._meetings[group][turn]
        meeting.reached[rank.program.rank] = rank.seconds
        rank.meetings.append(meeting)
        rank.memory.start(item, rank.seconds)
        if len(meeting.reached) == len(group):
            members = [self.ranks[member] for member in group]
            begin = max(
                *meeting.reached.values(), *(member.wire_free_seconds for member in members)
            )
            seconds = _SECONDS[type(item)](self.cluster, group, rank.memory.message_bytes(item))
            meeting.end_seconds = begin + seconds
            for member in members:
                member.wire_free_seconds = meeting.end_seconds
                own = member.program.rank
                self._event(own, Lane.COMMUNICATION, item, begin, meeting.end_seconds)

    def wait(self, rank: _Rank, instruction: Instruction | None) -> bool:
        """Wait for the collectives that `instruction` (None: the end of the step) needs; False if
        one of them has not been reached by all its ranks."""
        needed = _needed(rank.meetings, instruction)
        ends = [meeting.end_seconds for meeting in needed]
        if any(end is None for end in ends):
            return False
        for meeting, end in zip(needed, ends, strict=True):
            assert end is not None
            if end > rank.seconds:
                self._span(rank, "sync", -1, -1, rank.seconds, end, busy=False)
            rank.memory.end(meeting.item, rank.seconds)
        rank.meetings = [meeting for meeting in rank.meetings if meeting not in needed]
        return True

    def _sweep(self, rank: _Rank, kind: str, num_bytes: float) -> None:
        device_type = self.cluster.type_of(rank.program.rank)
        length = num_bytes / device_type.memory_bytes_per_second + device_type.overhead_seconds
        self._span(rank, kind, -1, -1, rank.seconds, rank.seconds + length)

    def _optimizer_step(self, rank: _Rank) -> None:
        length = optimizer_seconds(
            self.cluster.type_of(rank.program.rank),
            self.optimizer,
            parameter_bytes=sum(rank.memory.held.updated_bytes),
            num_parameters=len(rank.memory.held.updated_bytes),
            offloaded_bytes=sum(rank.memory.held.offloaded_bytes),
        )
        rank.memory.optimizer_step(rank.seconds, rank.seconds + length)
        self._span(rank, "optimizer", -1, -1, rank.seconds, rank.seconds + length)

    def _span(
        self,
        rank: _Rank,
        kind: str,
        stage: int,
        microbatch: int,
        begin: float,
        end: float,
        *,
        busy: bool = True,
    ) -> None:
        self.spans.append(Span(rank.program.rank, kind, stage, microbatch, begin, end))
        rank.seconds = end
        rank.busy_seconds += end - begin if busy else 0.0

    def _event(self, rank: int, lane: Lane, item: Instruction, begin: float, end: float) -> None:
        name = event_name(item)
        if name is not None:
            self.events.append(TraceEvent(rank, lane, name, begin, end))

    def result(self) -> Simulation:
        step = max((rank.seconds for rank in self.ranks), default=0.0)
        busy = tuple(rank.busy_seconds / step if step else 0.0 for rank in self.ranks)
        return Simulation(
            step_seconds=step,
            bubble_fraction=1.0 - sum(busy) / len(busy) if busy and step else 0.0,
            busy_fraction=busy,
            link_bytes=tuple(sorted(self.link_bytes.items())),
            peak_memory_bytes=tuple(rank.memory.peak_bytes for rank in self.ranks),
            memory_curves=tuple(rank.memory.points() for rank in self.ranks),
            timeline=tuple(sorted(self.spans, key=lambda span: (span.rank, span.begin_seconds))),
            events=tuple(sorted(self.events, key=lambda one: (one.rank, one.begin_seconds))),
        )


def _needed(meetings: list[_Meeting], instruction: Instruction | None) -> list[_Meeting]:
    match instruction:
        case AllReduce() | ReduceScatter() | AllGather() | Await():
            targets = set(instruction.targets)
            return [meeting for meeting in meetings if targets & set(meeting.item.targets)]
        case GradientNorm() | ClipGradients() | OptimizerStep() | None:
            return list(meetings)
        case _:
            return []


def _reads(stage: StageProgram, action: _Computation) -> list[Register]:
    if isinstance(action, Forward):
        return [Register(name, action.microbatch) for name, _ in stage.producers]
    if isinstance(action, BackwardWeight):
        return []
    return [
        Register(name, action.microbatch, consumer)
        for name, consumers in stage.consumers
        for consumer in consumers
    ]


def _writes(stage: StageProgram, action: _Computation) -> list[tuple[Register, TensorType]]:
    graph = stage.graph
    if isinstance(action, BackwardWeight):
        return []
    if isinstance(action, Forward):
        return [
            (
                Register(graph.values[output.value].name, action.microbatch),
                graph.values[output.value].type,
            )
            for output in graph.outputs_of(OutputKind.BOUNDARY)
        ]
    return [
        (Register(value.name, action.microbatch, action.stage), value.type)
        for value in graph.values_of(ValueKind.BOUNDARY)
        if value.requires_grad
    ]
