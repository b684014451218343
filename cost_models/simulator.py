"""Discrete-event simulation of one step: programs and a cluster to a timeline.

Every rank executes its instructions in order on one compute stream. A transfer starts when its
`Send` was executed, its `Recv` is posted (sends are taken as unbuffered) and earlier transfers
between the two ranks in that direction are done; it takes alpha-beta time beside computation. A
compute instruction waits for the transfers of what it reads. An `AllReduce` starts when all its
ranks have reached it and takes ring time. Durations are those of the cost model unless measured
ones are given.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..compiler.ir.cluster import Cluster
from ..compiler.ir.errors import VerificationError
from ..compiler.ir.graph import OutputKind, ValueKind
from ..compiler.ir.plan import OptimizerModel
from ..compiler.ir.program import (
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
from ..compiler.ir.types import TensorType
from .links import all_reduce_seconds
from .memory_curve import MemoryCurve
from .stages import StageSeconds, optimizer_seconds, stage_seconds

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
    """

    step_seconds: float
    bubble_fraction: float
    busy_fraction: tuple[float, ...]
    link_bytes: tuple[tuple[tuple[int, int], int], ...]
    peak_memory_bytes: tuple[int, ...]
    memory_curves: tuple[tuple[tuple[float, int], ...], ...]
    timeline: tuple[Span, ...]


_Computation = Forward | Backward | BackwardInput | BackwardWeight
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


@dataclass(slots=True)
class _Rank:
    program: Program
    position: int
    seconds: float
    busy_seconds: float
    memory: MemoryCurve


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
        for program in programs:
            device_type = cluster.type_of(program.rank)
            for stage in program.stages:
                key = program.rank, stage.index
                self.stages[key] = stage
                self.seconds[key] = measured.get(stage.index) or stage_seconds(
                    stage.graph, device_type, recomputed=stage.recomputed
                )
        self.ranks = [
            _Rank(
                program,
                0,
                0.0,
                0.0,
                MemoryCurve(program, optimizer, cluster.type_of(program.rank).backend),
            )
            for program in programs
        ]
        self.spans: list[Span] = []
        self.link_bytes: dict[tuple[int, int], int] = defaultdict(int)
        self._sent: dict[tuple[int, int, int], tuple[float, Send]] = {}
        self._posted: dict[tuple[int, int, int], tuple[float, Recv]] = {}
        self._link_free: dict[tuple[int, int], float] = defaultdict(float)
        self._arrival: dict[tuple[int, Register], float] = {}
        self._reached: dict[tuple[str, tuple[int, ...]], dict[int, float]] = defaultdict(dict)

    def advance(self, rank: _Rank) -> bool:
        """Execute instructions of `rank` until it has to wait; whether any was executed."""
        began = rank.position
        while rank.position < len(rank.program.instructions):
            if not self._execute(rank, rank.program.instructions[rank.position]):
                break
            rank.position += 1
        return rank.position > began

    def _execute(self, rank: _Rank, instruction: Instruction) -> bool:
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
            case AllReduce():
                return self._all_reduce(rank, instruction)
            case GradientNorm() | ClipGradients():
                self._sweep(rank, "sync", rank.memory.gradient_bytes)
            case OptimizerStep():
                self._optimizer_step(rank)
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
        self._span(rank, kind, action.stage, action.microbatch, begin, begin + length)
        rank.memory.action(kind, action.stage, action.microbatch, begin, begin + length)
        for register, value_type in _writes(stage, action):
            rank.memory.define(register, value_type, begin + length)
        return True

    def _all_reduce(self, rank: _Rank, instruction: AllReduce) -> bool:
        reached = self._reached[instruction.target, instruction.ranks]
        reached.setdefault(rank.program.rank, rank.seconds)
        if len(reached) < len(instruction.ranks):
            return False
        size = 8.0
        if instruction.target != GRADIENT_NORM:
            size = rank.memory.parameter_bytes(instruction.target)
        begin = max(reached.values())
        end = begin + all_reduce_seconds(self.cluster, instruction.ranks, size)
        self._span(rank, "sync", -1, -1, begin, end, busy=False)
        return True

    def _sweep(self, rank: _Rank, kind: str, num_bytes: float) -> None:
        device_type = self.cluster.type_of(rank.program.rank)
        length = num_bytes / device_type.memory_bytes_per_second + device_type.overhead_seconds
        self._span(rank, kind, -1, -1, rank.seconds, rank.seconds + length)

    def _optimizer_step(self, rank: _Rank) -> None:
        length = optimizer_seconds(
            self.cluster.type_of(rank.program.rank),
            self.optimizer,
            parameter_bytes=rank.memory.gradient_bytes,
            num_parameters=rank.memory.num_gradients,
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
        )


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
