"""What a simulated step is: its timeline, and where the time of every rank goes.

A rank's step is the sum of what it computes (`busy_seconds`), of communication that is not hidden
behind that (`exposed_seconds`: it does not compute, and a transfer or a collective of its own is
under way), of the host's time for instructions (`host_seconds`) and of idling (`idle_seconds`): it
waits for work of other ranks, while nothing travels to or from it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..compiler.ir.trace import TraceEvent
from .memory_curve import MemoryPeak

__all__ = ["Intervals", "RankSeconds", "Simulation", "Span", "covered_seconds", "joined"]

Intervals = Sequence[tuple[float, float]]


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
class RankSeconds:
    """Where the time of a rank goes.

    Args:
        busy_seconds: computing: F, B, I, W without the collectives in them, gradient norm and
            clipping, optimizer; on CPUs what the thread that computes does for messages, too.
        processor_seconds: what of this it takes with a processor of its own for each thread, and no
            transfers beside: by the clock of a thread.
        communication_seconds: with a transfer or a collective of its own under way.
        exposed_seconds: of these, those in which it does not compute; the others are hidden.
        host_seconds: of the host's time for instructions, those in which the rank does neither.
        idle_seconds: the rest of the step.
        sync_seconds: with collectives on gradients or updated parameters under way.
        exposed_sync_seconds: waiting for these alone.
        optimizer_seconds: of the update.
    """

    rank: int
    busy_seconds: float
    processor_seconds: float
    communication_seconds: float
    exposed_seconds: float
    host_seconds: float
    idle_seconds: float
    sync_seconds: float
    exposed_sync_seconds: float
    optimizer_seconds: float

    @property
    def hidden_seconds(self) -> float:
        """Communication beside computation."""
        return self.communication_seconds - self.exposed_seconds


@dataclass(frozen=True, slots=True)
class Simulation:
    """Predicted course of one step.

    Args:
        step_seconds: until the last rank is done.
        bubble_fraction: share of all ranks' time in which they do not compute.
        busy_fraction: per rank, the share of the step in which it computes.
        link_bytes: ((source rank, target rank), bytes sent), sorted; collectives included.
        peak_memory_bytes: per rank.
        memory_curves: per rank, (seconds, bytes) whenever the level changes.
        timeline: spans in order of rank and time.
        events: the same and all communication, in the form of a measured trace.
        ranks: where the time of each rank goes.
        peaks: what each rank holds when it holds the most.
    """

    step_seconds: float
    bubble_fraction: float
    busy_fraction: tuple[float, ...]
    link_bytes: tuple[tuple[tuple[int, int], int], ...]
    peak_memory_bytes: tuple[int, ...]
    memory_curves: tuple[tuple[tuple[float, int], ...], ...]
    timeline: tuple[Span, ...]
    events: tuple[TraceEvent, ...] = ()
    ranks: tuple[RankSeconds, ...] = ()
    peaks: tuple[MemoryPeak, ...] = ()


def joined(intervals: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The union of `intervals` as disjoint ones, in order.

    >>> joined([(2.0, 3.0), (0.0, 1.0), (0.5, 2.0)])
    [(0.0, 3.0)]
    """
    found: list[tuple[float, float]] = []
    for begin, end in sorted(intervals):
        if found and begin <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((begin, end))
    return found


def covered_seconds(intervals: Intervals, others: Intervals = ()) -> float:
    """Length of disjoint `intervals`, in order, less what `others`, likewise, cover of them.

    >>> covered_seconds([(0.0, 3.0)], [(1.0, 2.0)])
    2.0
    """
    total = sum(end - begin for begin, end in intervals)
    position = 0
    for begin, end in intervals:
        while position < len(others) and others[position][1] <= begin:
            position += 1
        current = position
        while current < len(others) and others[current][0] < end:
            total -= min(end, others[current][1]) - max(begin, others[current][0])
            current += 1
    return total
