"""Discrete-event simulation of one step: programs and a cluster to a timeline.

Every rank executes its instructions in order, each a while after the one before: its host spends
`instruction_seconds` on every instruction, before the device goes on where that is the CPU itself,
and beside it where the device has a queue (CUDA; then the device waits only where it is faster than
its host).

A transfer starts when its `Send` was executed, its `Recv` is posted (sends are taken as unbuffered)
and earlier transfers between the two ranks in that direction are done. A collective starts when all
its ranks have reached it and earlier ones of the same ranks are done. Both take their latency, then
share wires with what else travels (`wires.py`), beside computation, which they may slow down. A
computation waits for the transfers of what it reads, an instruction for the collectives whose
results it needs, and a `Send` for the oldest of those to the same rank where too many are under
way (`compiler/ir/messages.py`).

The collectives inside a stage are joined to a few, spread evenly over the action that holds them:
there its ranks wait for each other, and for the last, which comes a skew later. Those that go on
beside computation are waited for at the end of the action. Durations are those of the cost model
unless measured ones are given.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

from ..compiler.ir.cluster import Cluster
from ..compiler.ir.errors import VerificationError
from ..compiler.ir.graph import OutputKind, ValueKind
from ..compiler.ir.messages import MAX_SENDS_UNDER_WAY
from ..compiler.ir.plan import OptimizerModel
from ..compiler.ir.program import (
    AllGather,
    AllReduce,
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
from ..compiler.ir.trace import Lane, TraceEvent, event_name, inner_name
from ..compiler.ir.types import TensorType
from .action_memory import ActionMemory
from .discrete_events import Clock, Process, Work
from .exchanges import ActionCost, Exchange, exchange
from .host_messages import ahead_seconds, asking_seconds, bucket_seconds, send_seconds
from .memory_curve import MemoryCurve
from .shared_cores import SharedCores
from .simulated_rank import Meeting, SimulatedRank
from .simulation import Simulation, Span
from .stage_prices import Computation, StagePrices
from .stages import StageSeconds, optimizer_seconds
from .traffic import Traffic
from .wires import Wires

__all__ = ["Simulation", "Span", "simulate"]

_KINDS: dict[type, str] = {Forward: "F", Backward: "B", BackwardInput: "I", BackwardWeight: "W"}
_COLLECTIVES: dict[type, str] = {
    AllReduce: "all_reduce",
    ReduceScatter: "reduce_scatter",
    AllGather: "all_gather",
}
_DEFAULT_OPTIMIZER = OptimizerModel("adamw", 2.0)
_MOST_PIECES = 4  # of an action with collectives in it
_LEAST_SPEED = 0.05  # of computation beside transfers


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
        measured: by stage, seconds that replace the predicted ones, with the collectives inside.

    Raises:
        VerificationError: the programs cannot run to their end (a rank waits for ever), or
            something takes more seconds than there are numbers.
    """
    run = _Run(programs, cluster, optimizer, measured or {})
    try:
        for rank in run.ranks:
            run.clock.start(run.execute(rank))
        run.clock.run()
    except OverflowError as error:
        raise VerificationError(
            f"the programs take no finite time on cluster {cluster.name}: {_waiting(run)}",
            ways_out=("look for rates close to zero, and for endless latencies, in the cluster",),
        ) from error
    if any(rank.current is not None for rank in run.ranks):
        raise VerificationError(
            f"the programs do not run to their end: {_waiting(run)}",
            ways_out=("generate the programs again from the plan",),
        )
    return run.result()


def _waiting(run: _Run) -> str:
    """Where ranks are that are not done."""
    waiting = [rank for rank in run.ranks if rank.current is not None]
    return "; ".join(f"rank {rank.index} waits at {rank.current}" for rank in waiting)


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
        self.clock = Clock()
        self.wires = Wires(self.clock, cluster, self._slow_down)
        self.cores = SharedCores(cluster)
        self.traffic = Traffic(self.clock, cluster, self.wires, self._communicated)
        self.prices = StagePrices(programs, cluster, measured)
        self._actions: dict[Hashable, ActionMemory] = {}
        self.ranks = [self._rank(program) for program in programs]
        self._by_index = {rank.index: rank for rank in self.ranks}
        self.spans: list[Span] = []
        self.events: list[TraceEvent] = []

    def _rank(self, program: Program) -> SimulatedRank:
        kind = self.cluster.type_of(program.rank)
        memory = MemoryCurve(program, self.optimizer, kind.backend, self._actions)
        return SimulatedRank(program, memory, kind.instruction_seconds, kind.backend != "cpu")

    def _slow_down(self, device: int, share: float) -> None:
        """Transfers take `share` of what `device` computes with."""
        rank = self._by_index.get(device)
        if rank is not None:
            rank.left_share = max(1.0 - share, _LEAST_SPEED)
            self._set_speed(rank)

    def _set_speed(self, rank: SimulatedRank) -> None:
        if rank.work is not None:
            self.clock.set_speed(rank.work, rank.left_share * self.cores.speed(rank.index))

    def _computes(self, rank: SimulatedRank, work: Work | None) -> None:
        """`rank` begins with `work`, or is done (None)."""
        rank.work = work
        self.wires.computes(rank.index, work is not None)
        for index in self.cores.computes(rank.index, work is not None):
            self._set_speed(self._by_index[index])

    # -- instructions --------------------------------------------------------------------------

    def execute(self, rank: SimulatedRank) -> Process:
        """All that `rank` does."""
        for instruction in rank.program.instructions:
            rank.current = instruction
            if rank.instruction_seconds:
                yield from self._issue(rank)
            if rank.meetings:
                yield from self._wait(rank, instruction)
            yield from self._execute(rank, instruction)
        rank.current = "the end of the step"
        yield from self._wait(rank, None)
        for sends in rank.sends.values():
            while sends:
                yield sends[0][1].arrived
                rank.gone(sends.pop(0)[0], self.clock.now)
        rank.current = None
        rank.end_seconds = self.clock.now

    def _issue(self, rank: SimulatedRank) -> Process:
        """The host's time for the next instruction."""
        begin = self.clock.now
        if rank.queues:
            rank.host_seconds += rank.instruction_seconds
            yield self.clock.later(rank.host_seconds - begin)
        else:
            yield self.clock.later(rank.instruction_seconds)
        if self.clock.now > begin:
            rank.issuing.append((begin, self.clock.now))

    def _execute(self, rank: SimulatedRank, instruction: Instruction) -> Process:
        now, name = self.clock.now, event_name(instruction) or ""
        match instruction:
            case Forward() | Backward() | BackwardInput() | BackwardWeight():
                yield from self._compute(rank, instruction)
            case Send():
                yield from self._send(rank, instruction)
            case Recv():
                message = self.traffic.message(instruction.peer, rank.index, instruction.tag)
                message.recv = instruction
                rank.arriving[instruction.register].append(message)
                if instruction.offset is None:
                    rank.memory.define(instruction.register, instruction.type, now, name)
                else:  # the part, and what it arrives in
                    size = 2 * instruction.type.num_bytes
                    rank.memory.grow(instruction.register, size, now, name)
                self.clock.happen(message.posted)
                yield from self._work(rank, self.cluster.type_of(rank.index).message_seconds)
            case Free():
                rank.freed.update(instruction.registers)
                rank.drain(now)
                for register in instruction.registers:
                    rank.release(register, now)
            case AllReduce() | ReduceScatter() | AllGather():
                yield from self._start(rank, instruction, name)
            case GradientNorm() | ClipGradients():
                held = rank.memory.held
                moved = sum((*held.updated_bytes, *held.offloaded_bytes))
                kind = self.cluster.type_of(rank.index)
                seconds = moved / kind.memory_bytes_per_second + kind.overhead_seconds
                yield from self._close(rank, instruction, "sync", seconds)
                # the host reads the norm
                rank.host_seconds = max(rank.host_seconds, self.clock.now)
            case OptimizerStep():
                yield from self._optimizer_step(rank, instruction)

    def _work(
        self, rank: SimulatedRank, seconds: float, own_seconds: float | None = None
    ) -> Process:
        """Compute, at the speed that transfers and others on its cores leave.

        Args:
            own_seconds: of the thread that computes; None: all of them.
        """
        if seconds > 0.0:
            begin = self.clock.now
            work = Work(seconds)
            self._computes(rank, work)
            yield work.end
            self._computes(rank, None)
            own = seconds if own_seconds is None else own_seconds
            rank.processor_seconds += own * self.cores.share(rank.index)
            rank.busy.append((begin, self.clock.now))

    def _compute(self, rank: SimulatedRank, action: Computation) -> Process:
        stage = self.prices.stages[rank.index, action.stage]
        for register in _reads(stage, action):
            for message in rank.arriving.get(register, ()):
                yield message.arrived
        name, kind = event_name(action) or "", _KINDS[type(action)]
        part = action.part if isinstance(action, BackwardWeight) else None
        begin = self.clock.now
        for cost in self.prices.of(rank.index, action):
            yield from self._run(rank, cost, name)
        end = self.clock.now
        self.spans.append(Span(rank.index, kind, action.stage, action.microbatch, begin, end))
        self.events.append(TraceEvent(rank.index, Lane.COMPUTE, name, begin, end))
        rank.memory.action(kind, action.stage, part, begin, end, name)
        for register, value_type in _writes(stage, action):
            rank.memory.define(register, value_type, end, name)

    def _run(self, rank: SimulatedRank, cost: ActionCost, name: str) -> Process:
        """One action: pieces of computation, after each of which the stage's ranks meet."""
        count = max((entry.count for entry in (*cost.exposed, *cost.hidden)), default=1.0)
        pieces = max(1, min(_MOST_PIECES, round(count)))
        piece = cost.scaled(1 / pieces)
        beside: list[Meeting] = []
        for _ in range(pieces):
            for entry in piece.hidden:
                beside.append(self._meet(rank, self._beside(rank, entry), name, "hidden"))
                yield from self._work(rank, *ahead_seconds(self.cluster, rank.index, entry))
            yield from self._work(rank, piece.compute_seconds)
            yield self.clock.later(_skew_seconds(piece))
            for entry in piece.exposed:
                yield self._meet(rank, entry, name, "exposed").end
        for meeting in beside:
            yield meeting.end

    def _beside(self, rank: SimulatedRank, entry: Exchange) -> Exchange:
        """`entry` as it travels where its ranks do not wait for it."""
        on_host = self.cluster.type_of(rank.index).backend == "cpu"
        return entry.at_once() if on_host and entry.collective != "all_reduce" else entry

    def _meet(self, rank: SimulatedRank, entry: Exchange, name: str, channel: str) -> Meeting:
        """Collectives inside the action called `name`."""
        total = sum(seconds for _, seconds in entry.kinds) or 1.0
        names = [
            (inner_name(kind, entry.ranks, name), seconds / total) for kind, seconds in entry.kinds
        ]
        return self.traffic.meet(rank.index, entry, names, channel)

    def _send(self, rank: SimulatedRank, send: Send) -> Process:
        rank.drain(self.clock.now)
        sends = rank.sends[send.peer]
        while len(sends) >= MAX_SENDS_UNDER_WAY:
            yield sends[0][1].arrived
            rank.gone(sends.pop(0)[0], self.clock.now)
            rank.host_seconds = max(rank.host_seconds, self.clock.now)
        message = self.traffic.message(rank.index, send.peer, send.tag)
        message.send = send
        sends.append((send.register, message))
        rank.sending[send.register] += 1
        self.clock.happen(message.sent)
        size = send.type.num_bytes
        if send.offset is not None:  # it is copied out
            rank.memory.grow(send.register, size, self.clock.now, event_name(send) or "")
        yield from self._work(rank, send_seconds(self.cluster, rank.index, send.peer, size))

    def _optimizer_step(self, rank: SimulatedRank, item: OptimizerStep) -> Process:
        seconds = optimizer_seconds(
            self.cluster.type_of(rank.index),
            self.optimizer,
            parameter_bytes=sum(rank.memory.held.updated_bytes),
            num_parameters=len(rank.memory.held.updated_bytes),
            offloaded_bytes=sum(rank.memory.held.offloaded_bytes),
        )
        begin = self.clock.now
        yield from self._close(rank, item, "optimizer", seconds)
        rank.updating_seconds += self.clock.now - begin
        rank.memory.optimizer_step(begin, self.clock.now, event_name(item) or "")

    def _close(
        self,
        rank: SimulatedRank,
        item: GradientNorm | ClipGradients | OptimizerStep,
        kind: str,
        seconds: float,
    ) -> Process:
        """What a rank does once a step, of a span `kind`."""
        begin = self.clock.now
        yield from self._work(rank, seconds)
        end = self.clock.now
        self.spans.append(Span(rank.index, kind, -1, -1, begin, end))
        self.events.append(TraceEvent(rank.index, Lane.COMPUTE, event_name(item) or "", begin, end))

    # -- collectives ---------------------------------------------------------------------------

    def _communicated(self, rank: int, name: str, begin: float, end: float, is_sync: bool) -> None:
        """Something of `rank` was under way."""
        self.events.append(TraceEvent(rank, Lane.COMMUNICATION, name, begin, end))
        state = self._by_index[rank]
        state.under_way.append((begin, end))
        if is_sync:
            state.syncs.append((begin, end))

    def _start(self, rank: SimulatedRank, item: Collective, name: str) -> Process:
        """`rank` reaches a collective, and goes on."""
        size = rank.memory.message_bytes(item)
        entry = exchange(self.cluster, _COLLECTIVES[type(item)], item.ranks, size)
        host = bucket_seconds(
            self.cluster,
            rank.index,
            entry.collective,
            item.ranks,
            size,
            num_tensors=len(item.targets),
            asking=asking_seconds(self.cluster, rank.index, entry),
        )
        rank.memory.start(item, self.clock.now, name)
        yield from self._work(rank, host.before)
        names = ((name, 1.0),)
        meeting = self.traffic.meet(rank.index, entry.without(host.finishing), names, "program")
        meeting.host[rank.index] = host
        rank.meetings.append((item, meeting))
        yield from self._work(rank, host.sending)

    def _wait(self, rank: SimulatedRank, instruction: Instruction | None) -> Process:
        """Wait for the collectives that `instruction` (None: the end of the step) needs."""
        for item, meeting in rank.needed(instruction):
            begin = self.clock.now
            yield meeting.end
            if self.clock.now > begin:
                self.spans.append(Span(rank.index, "sync", -1, -1, begin, self.clock.now))
            host = meeting.host[rank.index]
            yield from self._work(rank, host.finishing + host.after)
            rank.memory.end(item, self.clock.now, event_name(item) or "")
            rank.meetings.remove((item, meeting))

    # -- result --------------------------------------------------------------------------------

    def result(self) -> Simulation:
        step = max((rank.end_seconds for rank in self.ranks), default=0.0)
        ranks = tuple(rank.seconds(step) for rank in self.ranks)
        busy = tuple(rank.busy_seconds / step if step else 0.0 for rank in ranks)
        return Simulation(
            step_seconds=step,
            bubble_fraction=1.0 - sum(busy) / len(busy) if busy and step else 0.0,
            busy_fraction=busy,
            link_bytes=tuple(
                (edge, round(size)) for edge, size in sorted(self.traffic.link_bytes.items())
            ),
            peak_memory_bytes=tuple(rank.memory.peak.total_bytes for rank in self.ranks),
            memory_curves=tuple(rank.memory.points() for rank in self.ranks),
            timeline=tuple(sorted(self.spans, key=lambda span: (span.rank, span.begin_seconds))),
            events=tuple(sorted(self.events, key=lambda one: (one.rank, one.begin_seconds))),
            ranks=ranks,
            peaks=tuple(rank.memory.peak for rank in self.ranks),
        )


def _skew_seconds(piece: ActionCost) -> float:
    """How long ranks wait for the last of them where they meet, as long as they compute in between
    at most."""
    skews = (entry.skew_seconds for entry in piece.exposed)
    return min(max(skews, default=0.0), piece.compute_seconds)


def _reads(stage: StageProgram, action: Computation) -> list[Register]:
    if isinstance(action, Forward):
        return [Register(name, action.microbatch) for name, _ in stage.producers]
    if isinstance(action, BackwardWeight):
        return []
    return [
        Register(name, action.microbatch, consumer)
        for name, consumers in stage.consumers
        for consumer in consumers
    ]


def _writes(stage: StageProgram, action: Computation) -> list[tuple[Register, TensorType]]:
    graph = stage.graph
    if isinstance(action, BackwardWeight):
        return []
    if isinstance(action, Forward):
        return [
            (
                Register(output.target, action.microbatch),
                graph.values[output.value].type,
            )
            for output in graph.outputs_of(OutputKind.BOUNDARY)
        ]
    return [
        (Register(value.name, action.microbatch, action.stage), value.type)
        for value in graph.values_of(ValueKind.BOUNDARY)
        if value.requires_grad
    ]
