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
there its ranks wait for each other. Durations are those of the cost model unless measured ones are
given.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from ..compiler.ir.cluster import Cluster, DeviceType
from ..compiler.ir.errors import VerificationError
from ..compiler.ir.graph import OutputKind, ValueKind
from ..compiler.ir.messages import MAX_SENDS_UNDER_WAY
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
from .discrete_events import Clock, Event, Process, Work
from .exchanges import ActionCost, Exchange, StageCosts, exchange, stage_costs
from .host_messages import HostSeconds, ahead_seconds, bucket_seconds, send_seconds
from .memory import ActionMemory
from .memory_curve import MemoryCurve, types_of
from .simulation import RankSeconds, Simulation, Span, covered_seconds, joined
from .stages import StageSeconds, optimizer_seconds, part_shares
from .wires import Flow, Wires

__all__ = ["Simulation", "Span", "simulate"]

_Computation = Forward | Backward | BackwardInput | BackwardWeight
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
        VerificationError: the programs cannot run to their end (a rank waits for ever).
    """
    run = _Run(programs, cluster, optimizer, measured or {})
    for rank in run.ranks:
        run.clock.start(run.execute(rank))
    run.clock.run()
    if any(rank.current is not None for rank in run.ranks):
        raise _stuck(run)
    return run.result()


def _stuck(run: _Run) -> VerificationError:
    lines = [
        f"rank {rank.index} waits at {rank.current}"
        for rank in run.ranks
        if rank.current is not None
    ]
    return VerificationError(
        f"the programs do not run to their end: {'; '.join(lines)}",
        ways_out=("generate the programs again from the plan",),
    )


@dataclass(slots=True, eq=False)
class _Message:
    """A transfer: when both its ends are ready, and when it is there."""

    sent: Event = field(default_factory=Event)
    posted: Event = field(default_factory=Event)
    left: Event = field(default_factory=Event)  # the wire is free for the next
    arrived: Event = field(default_factory=Event)
    send: Send | None = None
    recv: Recv | None = None


@dataclass(slots=True, eq=False)
class _Meeting:
    """A collective, or several inside an action: who has reached it, and when it is over."""

    exchange: Exchange
    name: str
    is_sync: bool
    reached: int = 0
    end: Event = field(default_factory=Event)
    host: dict[int, HostSeconds] = field(default_factory=dict)  # by rank


@dataclass(slots=True, eq=False)
class _Rank:
    program: Program
    memory: MemoryCurve
    instruction_seconds: float
    queues: bool  # the device has a queue, which the host fills ahead
    current: object = "its start"  # the instruction it is at; None: it is done
    host_seconds: float = 0.0
    meetings: list[tuple[Collective, _Meeting]] = field(default_factory=list)  # not waited for yet
    sends: dict[int, list[tuple[Register, _Message]]] = field(
        default_factory=lambda: defaultdict(list)
    )
    sending: Counter[Register] = field(default_factory=Counter)
    freed: set[Register] = field(default_factory=set)
    arriving: dict[Register, _Message] = field(default_factory=dict)
    work: Work | None = None
    speed: float = 1.0
    end_seconds: float = 0.0
    busy: list[tuple[float, float]] = field(default_factory=list)
    issuing: list[tuple[float, float]] = field(default_factory=list)
    under_way: list[tuple[float, float]] = field(default_factory=list)
    syncs: list[tuple[float, float]] = field(default_factory=list)

    @property
    def index(self) -> int:
        return self.program.rank


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
        self.stages: dict[tuple[int, int], StageProgram] = {}  # by (rank, stage)
        self.costs: dict[tuple[int, int], StageCosts] = {}
        self.shares: dict[tuple[int, int], tuple[float, ...]] = {}  # parts of weight gradients
        self._alike: dict[Hashable, tuple[StageProgram, StageCosts, tuple[float, ...]]] = {}
        self._actions: dict[Hashable, ActionMemory] = {}
        for program in programs:
            for stage in program.stages:
                key = program.rank, stage.index
                self.stages[key] = stage
                self.costs[key], self.shares[key] = self._priced(
                    stage, cluster.type_of(program.rank), measured.get(stage.index)
                )
        self.ranks = [self._rank(program) for program in programs]
        self._by_index = {rank.index: rank for rank in self.ranks}
        self.spans: list[Span] = []
        self.events: list[TraceEvent] = []
        self.link_bytes: dict[tuple[int, int], float] = defaultdict(float)
        self._messages: dict[tuple[int, int, int], _Message] = {}
        self._last_message: dict[tuple[int, int], _Message] = {}
        self._last_meeting: dict[tuple[int, ...], _Meeting] = {}
        self._meetings: dict[tuple[tuple[int, ...], str], list[_Meeting]] = defaultdict(list)
        self._turns: dict[tuple[int, tuple[int, ...], str], int] = defaultdict(int)

    def _priced(
        self, stage: StageProgram, device_type: DeviceType, measured: StageSeconds | None
    ) -> tuple[StageCosts, tuple[float, ...]]:
        """Costs and shares of parts; ranks with tensors and links alike are priced once."""
        network = Network(self.cluster, stage.axes)
        links = tuple(network.ring(axis) for axis, _ in stage.axes)
        key = stage.index, device_type.name, links, types_of(stage)
        if key not in self._alike:
            costs = stage_costs(stage, device_type, network, measured)
            self._alike[key] = stage, costs, part_shares(stage, device_type, network)
        first, costs, shares = self._alike[key]
        pairs = zip(first.axes, stage.axes, strict=True)
        return costs.among({old: new for (_, old), (_, new) in pairs}), shares

    def _rank(self, program: Program) -> _Rank:
        kind = self.cluster.type_of(program.rank)
        memory = MemoryCurve(program, self.optimizer, kind.backend, self._actions)
        return _Rank(program, memory, kind.instruction_seconds, kind.backend != "cpu")

    def _slow_down(self, device: int, share: float) -> None:
        """Transfers take `share` of what `device` computes with."""
        rank = self._by_index.get(device)
        if rank is not None:
            rank.speed = max(1.0 - share, _LEAST_SPEED)
            if rank.work is not None:
                self.clock.set_speed(rank.work, rank.speed)

    # -- instructions --------------------------------------------------------------------------

    def execute(self, rank: _Rank) -> Process:
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
                self._gone(rank, sends.pop(0)[0])
        rank.current = None
        rank.end_seconds = self.clock.now

    def _issue(self, rank: _Rank) -> Process:
        """The host's time for the next instruction."""
        begin = self.clock.now
        if rank.queues:
            rank.host_seconds += rank.instruction_seconds
            yield self.clock.later(rank.host_seconds - begin)
        else:
            yield self.clock.later(rank.instruction_seconds)
        if self.clock.now > begin:
            rank.issuing.append((begin, self.clock.now))

    def _execute(self, rank: _Rank, instruction: Instruction) -> Process:
        now, name = self.clock.now, event_name(instruction) or ""
        match instruction:
            case Forward() | Backward() | BackwardInput() | BackwardWeight():
                yield from self._compute(rank, instruction)
            case Send():
                yield from self._send(rank, instruction)
            case Recv():
                message = self._message(instruction.peer, rank.index, instruction.tag)
                message.recv = instruction
                rank.arriving[instruction.register] = message
                rank.memory.define(instruction.register, instruction.type, now, name)
                self.clock.happen(message.posted)
            case Free():
                rank.freed.update(instruction.registers)
                self._drain(rank)
                for register in instruction.registers:
                    self._release(rank, register)
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

    def _work(self, rank: _Rank, seconds: float) -> Process:
        """Compute, at the speed that transfers leave."""
        if seconds > 0.0:
            begin = self.clock.now
            rank.work = Work(seconds)
            self.clock.set_speed(rank.work, rank.speed)
            yield rank.work.end
            rank.work = None
            rank.busy.append((begin, self.clock.now))

    def _compute(self, rank: _Rank, action: _Computation) -> Process:
        stage = self.stages[rank.index, action.stage]
        for register in _reads(stage, action):
            if register in rank.arriving:
                yield rank.arriving[register].arrived
        name, kind = event_name(action) or "", _KINDS[type(action)]
        part = action.part if isinstance(action, BackwardWeight) else None
        begin = self.clock.now
        for cost in self._costs(rank, action, part):
            yield from self._run(rank, cost, name)
        end = self.clock.now
        self.spans.append(Span(rank.index, kind, action.stage, action.microbatch, begin, end))
        self.events.append(TraceEvent(rank.index, Lane.COMPUTE, name, begin, end))
        rank.memory.action(kind, action.stage, part, begin, end, name)
        for register, value_type in _writes(stage, action):
            rank.memory.define(register, value_type, end, name)

    def _costs(self, rank: _Rank, action: _Computation, part: int | None) -> Iterator[ActionCost]:
        costs = self.costs[rank.index, action.stage]
        if isinstance(action, Forward):
            yield costs.forward
        if isinstance(action, Backward | BackwardInput):
            yield costs.backward_input
        if isinstance(action, Backward | BackwardWeight):
            weight = costs.backward_weight
            shares = self.shares[rank.index, action.stage]
            yield weight if part is None else weight.scaled(shares[part])

    def _run(self, rank: _Rank, cost: ActionCost, name: str) -> Process:
        """One action: pieces of computation, after each of which the stage's ranks meet."""
        count = max((entry.count for entry in (*cost.exposed, *cost.hidden)), default=1.0)
        pieces = max(1, min(_MOST_PIECES, round(count)))
        piece = cost.scaled(1 / pieces)
        for _ in range(pieces):
            for entry in piece.hidden:
                self._meet(rank, entry, f"{_axis(entry)} beside {name}", "hidden")
                yield from self._work(rank, ahead_seconds(self.cluster, rank.index, entry))
            yield from self._work(rank, piece.compute_seconds)
            for entry in piece.exposed:
                meeting = self._meet(rank, entry, f"{_axis(entry)} in {name}", "exposed")
                yield meeting.end

    def _send(self, rank: _Rank, send: Send) -> Process:
        self._drain(rank)
        sends = rank.sends[send.peer]
        while len(sends) >= MAX_SENDS_UNDER_WAY:
            yield sends[0][1].arrived
            self._gone(rank, sends.pop(0)[0])
            rank.host_seconds = max(rank.host_seconds, self.clock.now)
        message = self._message(rank.index, send.peer, send.tag)
        message.send = send
        sends.append((send.register, message))
        rank.sending[send.register] += 1
        self.clock.happen(message.sent)
        size = send.type.num_bytes
        yield from self._work(rank, send_seconds(self.cluster, rank.index, send.peer, size))

    def _drain(self, rank: _Rank) -> None:
        """Give up what has been sent, where that can be seen (not over gloo)."""
        for peer, sends in rank.sends.items() if rank.queues else ():
            over = [register for register, message in sends if message.arrived.seconds is not None]
            if over:
                rank.sends[peer] = [entry for entry in sends if entry[1].arrived.seconds is None]
                for register in over:
                    self._gone(rank, register)

    def _gone(self, rank: _Rank, register: Register) -> None:
        """One message of a register has left."""
        rank.sending[register] -= 1
        self._release(rank, register)

    def _release(self, rank: _Rank, register: Register) -> None:
        """A freed register goes, unless it is still being sent."""
        if register in rank.freed and not rank.sending[register]:
            rank.memory.free((register,), self.clock.now, "")

    def _optimizer_step(self, rank: _Rank, item: OptimizerStep) -> Process:
        seconds = optimizer_seconds(
            self.cluster.type_of(rank.index),
            self.optimizer,
            parameter_bytes=sum(rank.memory.held.updated_bytes),
            num_parameters=len(rank.memory.held.updated_bytes),
            offloaded_bytes=sum(rank.memory.held.offloaded_bytes),
        )
        begin = self.clock.now
        yield from self._close(rank, item, "optimizer", seconds)
        rank.memory.optimizer_step(begin, self.clock.now, event_name(item) or "")

    def _close(
        self,
        rank: _Rank,
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

    # -- messages ------------------------------------------------------------------------------

    def _message(self, source: int, target: int, tag: int) -> _Message:
        key = source, target, tag
        if key not in self._messages:
            self._messages[key] = _Message()
            self.clock.start(self._carry(key, self._messages[key]))
        return self._messages[key]

    def _carry(self, key: tuple[int, int, int], message: _Message) -> Process:
        """Carry a message once both its ends are known."""
        yield message.sent
        yield message.posted
        assert message.send is not None and message.recv is not None
        pair = key[:2]
        before = self._last_message.get(pair)
        self._last_message[pair] = message
        begin, size = self.clock.now, message.send.type.num_bytes
        link = self.cluster.link(*pair)
        yield self.clock.later(link.latency_seconds)
        if before is not None:
            yield before.left
            begin = max(begin, (before.left.seconds or 0.0) - link.latency_seconds)
        flow = Flow((pair,), 0.0, size / link.bytes_per_second)
        yield from self.wires.carry(flow)
        end = self.clock.now
        self.link_bytes[pair] += size
        self._communicated(pair[0], event_name(message.send) or "", begin, end)
        self._communicated(pair[1], event_name(message.recv) or "", begin, end)
        self.clock.happen(message.left)
        self.clock.happen(message.arrived)

    def _communicated(
        self, rank: int, name: str, begin: float, end: float, *, is_sync: bool = False
    ) -> None:
        self.events.append(TraceEvent(rank, Lane.COMMUNICATION, name, begin, end))
        state = self._by_index[rank]
        state.under_way.append((begin, end))
        if is_sync:
            state.syncs.append((begin, end))

    # -- collectives ---------------------------------------------------------------------------

    def _start(self, rank: _Rank, item: Collective, name: str) -> Process:
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
            asking=entry.latency_seconds,
        )
        rank.memory.start(item, self.clock.now, name)
        yield from self._work(rank, host.before)
        meeting = self._meet(rank, entry.without(host.finishing), name, "program")
        meeting.host[rank.index] = host
        rank.meetings.append((item, meeting))
        yield from self._work(rank, host.sending)

    def _meet(self, rank: _Rank, entry: Exchange, name: str, channel: str) -> _Meeting:
        """`rank` reaches its next meeting with the ranks of `entry` in `channel`."""
        group = tuple(sorted(entry.ranks))
        turn = self._turns[rank.index, group, channel]
        self._turns[rank.index, group, channel] += 1
        meetings = self._meetings[group, channel]
        if turn == len(meetings):
            meetings.append(_Meeting(entry, name, channel == "program"))
        meeting = meetings[turn]
        meeting.reached += 1
        if meeting.reached == len(group):
            before = self._last_meeting.get(group)
            self._last_meeting[group] = meeting
            self.clock.start(self._hold(group, meeting, before))
        return meeting

    def _hold(self, group: tuple[int, ...], meeting: _Meeting, before: _Meeting | None) -> Process:
        if before is not None:
            yield before.end
        begin, entry = self.clock.now, meeting.exchange
        edges = tuple(edge for edge, _ in entry.edges)
        if edges:
            flow = Flow(edges, entry.latency_seconds, entry.wire_seconds, entry.collective)
            yield from self.wires.carry(flow)
        for edge, size in entry.edges:
            self.link_bytes[edge] += size
        for member in group:
            self._communicated(member, meeting.name, begin, self.clock.now, is_sync=meeting.is_sync)
        self.clock.happen(meeting.end)

    def _wait(self, rank: _Rank, instruction: Instruction | None) -> Process:
        """Wait for the collectives that `instruction` (None: the end of the step) needs."""
        for item, meeting in _needed(rank.meetings, instruction):
            begin = self.clock.now
            yield meeting.end
            if self.clock.now > begin:
                self.spans.append(Span(rank.index, "sync", -1, -1, begin, self.clock.now))
            host = meeting.host[rank.index]
            yield from self._work(rank, host.finishing + host.after)
            rank.memory.end(item, self.clock.now, meeting.name)
            rank.meetings.remove((item, meeting))

    # -- result --------------------------------------------------------------------------------

    def result(self) -> Simulation:
        step = max((rank.end_seconds for rank in self.ranks), default=0.0)
        updates: dict[int, float] = defaultdict(float)
        for span in self.spans:
            if span.kind == "optimizer":
                updates[span.rank] += span.end_seconds - span.begin_seconds
        ranks = tuple(_seconds(rank, step, updates[rank.index]) for rank in self.ranks)
        busy = tuple(rank.busy_seconds / step if step else 0.0 for rank in ranks)
        return Simulation(
            step_seconds=step,
            bubble_fraction=1.0 - sum(busy) / len(busy) if busy and step else 0.0,
            busy_fraction=busy,
            link_bytes=tuple((edge, round(size)) for edge, size in sorted(self.link_bytes.items())),
            peak_memory_bytes=tuple(rank.memory.peak.total_bytes for rank in self.ranks),
            memory_curves=tuple(rank.memory.points() for rank in self.ranks),
            timeline=tuple(sorted(self.spans, key=lambda span: (span.rank, span.begin_seconds))),
            events=tuple(sorted(self.events, key=lambda one: (one.rank, one.begin_seconds))),
            ranks=ranks,
            peaks=tuple(rank.memory.peak for rank in self.ranks),
        )


def _seconds(rank: _Rank, step: float, update: float) -> RankSeconds:
    """Where the time of `rank` goes.

    Args:
        update: seconds of its optimizer.
    """
    busy, under_way, syncs = joined(rank.busy), joined(rank.under_way), joined(rank.syncs)
    working = joined((*busy, *under_way))
    host = covered_seconds(joined(rank.issuing), working)
    return RankSeconds(
        rank=rank.index,
        busy_seconds=covered_seconds(busy),
        communication_seconds=covered_seconds(under_way),
        exposed_seconds=covered_seconds(under_way, busy),
        host_seconds=host,
        idle_seconds=max(step - covered_seconds(working) - host, 0.0),
        sync_seconds=covered_seconds(syncs),
        exposed_sync_seconds=covered_seconds(syncs, busy),
        optimizer_seconds=update,
    )


def _axis(entry: Exchange) -> str:
    return f"{entry.collective} over {','.join(map(str, entry.ranks))}"


def _needed(
    meetings: Sequence[tuple[Collective, _Meeting]], instruction: Instruction | None
) -> list[tuple[Collective, _Meeting]]:
    match instruction:
        case AllReduce() | ReduceScatter() | AllGather() | Await():
            targets = set(instruction.targets)
            return [entry for entry in meetings if targets & set(entry[0].targets)]
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
