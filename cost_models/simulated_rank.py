"""State of one rank in a simulated step, and what it is told about its messages and collectives."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..compiler.ir.program import (
    AllGather,
    AllReduce,
    Await,
    ClipGradients,
    Collective,
    GradientNorm,
    Instruction,
    OptimizerStep,
    Program,
    Recv,
    ReduceScatter,
    Register,
    Send,
)
from .discrete_events import Event, Work
from .exchanges import Exchange
from .host_messages import HostSeconds
from .memory_curve import MemoryCurve
from .simulation import RankSeconds, covered_seconds, joined

__all__ = ["Meeting", "Message", "SimulatedRank"]


@dataclass(slots=True, eq=False)
class Message:
    """A transfer: when both its ends are ready, and when it is there."""

    sent: Event = field(default_factory=Event)
    posted: Event = field(default_factory=Event)
    left: Event = field(default_factory=Event)  # the wire is free for the next
    arrived: Event = field(default_factory=Event)
    send: Send | None = None
    recv: Recv | None = None


@dataclass(slots=True, eq=False)
class Meeting:
    """A collective, or several inside an action: who has reached it, and when it is over.

    Args:
        names: what is told of it, one after the other, and the share of each.
        is_hidden: whether its ranks go on meanwhile.
    """

    exchange: Exchange
    names: Sequence[tuple[str, float]]
    is_sync: bool
    is_hidden: bool
    reached: int = 0
    end: Event = field(default_factory=Event)
    host: dict[int, HostSeconds] = field(default_factory=dict)  # by rank


@dataclass(slots=True, eq=False)
class SimulatedRank:
    """What a rank is at and has under way, and when it did what: intervals of seconds.

    Args:
        queues: the device has a queue, which the host fills ahead.
    """

    program: Program
    memory: MemoryCurve
    instruction_seconds: float
    queues: bool
    current: object = "its start"  # the instruction it is at; None: it is done
    host_seconds: float = 0.0
    meetings: list[tuple[Collective, Meeting]] = field(default_factory=list)  # not waited for yet
    sends: dict[int, list[tuple[Register, Message]]] = field(
        default_factory=lambda: defaultdict(list)
    )
    sending: Counter[Register] = field(default_factory=Counter)
    freed: set[Register] = field(default_factory=set)
    arriving: dict[Register, list[Message]] = field(default_factory=lambda: defaultdict(list))
    work: Work | None = None
    left_share: float = 1.0  # of its speed, by transfers
    end_seconds: float = 0.0
    updating_seconds: float = 0.0
    processor_seconds: float = 0.0
    busy: list[tuple[float, float]] = field(default_factory=list)
    issuing: list[tuple[float, float]] = field(default_factory=list)
    under_way: list[tuple[float, float]] = field(default_factory=list)
    syncs: list[tuple[float, float]] = field(default_factory=list)

    @property
    def index(self) -> int:
        return self.program.rank

    def needed(self, instruction: Instruction | None) -> list[tuple[Collective, Meeting]]:
        """The collectives that `instruction` (None: the end of the step) waits for."""
        match instruction:
            case AllReduce() | ReduceScatter() | AllGather() | Await():
                targets = set(instruction.targets)
                return [entry for entry in self.meetings if targets & set(entry[0].targets)]
            case GradientNorm() | ClipGradients() | OptimizerStep() | None:
                return list(self.meetings)
            case _:
                return []

    def gone(self, register: Register, now: float) -> None:
        """One message of a register has left."""
        self.sending[register] -= 1
        self.release(register, now)

    def release(self, register: Register, now: float) -> None:
        """A freed register goes, unless it is still being sent."""
        if register in self.freed and not self.sending[register]:
            self.memory.free((register,), now, "")

    def drain(self, now: float) -> None:
        """Give up what has been sent, where that can be seen (not over gloo)."""
        for peer, sends in self.sends.items() if self.queues else ():
            over = [register for register, message in sends if message.arrived.seconds is not None]
            if over:
                self.sends[peer] = [entry for entry in sends if entry[1].arrived.seconds is None]
                for register in over:
                    self.gone(register, now)

    def seconds(self, step: float) -> RankSeconds:
        """Where its time goes, of a step of `step` seconds."""
        busy, under_way, syncs = joined(self.busy), joined(self.under_way), joined(self.syncs)
        working = joined((*busy, *under_way))
        host = covered_seconds(joined(self.issuing), working)
        return RankSeconds(
            rank=self.index,
            busy_seconds=covered_seconds(busy),
            processor_seconds=self.processor_seconds,
            communication_seconds=covered_seconds(under_way),
            exposed_seconds=covered_seconds(under_way, busy),
            host_seconds=host,
            idle_seconds=max(step - covered_seconds(working) - host, 0.0),
            sync_seconds=covered_seconds(syncs),
            exposed_sync_seconds=covered_seconds(syncs, busy),
            optimizer_seconds=self.updating_seconds,
        )
