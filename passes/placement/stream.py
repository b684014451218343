"""Decides in which order devices run their pieces for a stream of microbatches.

List scheduling in predicted time: a device that is free takes, of the pieces whose inputs have
arrived, one of the oldest microbatch, and among those the first. Serving the oldest first keeps a
line that returns to its stations stable at any rate below that of the busiest one (Lu and Kumar,
"Distributed Scheduling Based on Due Dates and Buffer Priorities", 1991), so the busiest device is
never long without work. Microbatches enter only while few are under way: as few as cost no more
than a hundredth of the time that is possible without a limit, since each holds memory. Where pieces
take now more, now less, the times compared are those to be expected (`unsteady.py`).

The order is one of a run that came to its end, so it has no deadlock.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ...compiler.ir.schedule import Action, ActionKind, Schedule
from .unsteady import expected_seconds, random_times

__all__ = ["NAME", "StreamRun", "stream_schedule"]

NAME = "stream"
_WORTH = 1.01  # times the least time, to have fewer microbatches under way


@dataclass(frozen=True, slots=True)
class StreamRun:
    """A schedule and its course in predicted time.

    Args:
        seconds: until all is done, to be expected.
        window: microbatches under way at most.
    """

    schedule: Schedule
    seconds: float
    window: int


def stream_schedule(
    *,
    devices: Sequence[int],
    seconds: Sequence[float],
    edges: Mapping[tuple[int, int], float],
    num_microbatches: int,
    unsteady: Sequence[float] = (),
) -> StreamRun:
    """The order of all pieces and microbatches on every device.

    Args:
        devices: of every piece, in a topological order of pieces.
        seconds: of every piece, one microbatch.
        edges: (piece, later piece that reads it) -> seconds on the way.
        num_microbatches: of the stream.
        unsteady: of every piece, variance of its time over its mean, in seconds; none: steady.
    """
    line = _Line(tuple(devices), tuple(seconds), dict(edges), num_microbatches)
    streams = random_times(seconds, unsteady, num_microbatches) if any(unsteady) else []

    def run(window: int) -> StreamRun:
        found = line.run(window)
        if not streams:
            return found
        return replace(found, seconds=expected_seconds(found.schedule, line.after, streams))

    best = run(num_microbatches)
    window = 1
    while window < num_microbatches:
        found = run(window)
        if found.seconds <= _WORTH * best.seconds:
            return found
        window *= 2
    return best


class _Line:
    def __init__(
        self,
        devices: tuple[int, ...],
        seconds: tuple[float, ...],
        edges: dict[tuple[int, int], float],
        num_microbatches: int,
    ) -> None:
        self.devices, self.seconds, self.count = devices, seconds, num_microbatches
        self.after: list[list[tuple[int, float]]] = [[] for _ in devices]
        self.num_inputs = [0] * len(devices)
        for (source, target), delay in sorted(edges.items()):
            self.after[source].append((target, delay))
            self.num_inputs[target] += 1

    def run(self, window: int) -> StreamRun:
        """Play the stream with at most `window` microbatches under way."""
        play = _Play(self)
        while play.step(window):
            pass
        ranks = tuple(map(tuple, play.ranks))
        return StreamRun(
            Schedule(NAME, len(self.devices), self.count, ranks), play.now, min(window, self.count)
        )


class _Play:
    """A stream under way. `events` are (time, 0 for an end or 1 for an arrival, microbatch, piece),
    `ready` what each device could run, as (microbatch, piece)."""

    def __init__(self, line: _Line) -> None:
        self.line = line
        self.ranks: list[list[Action]] = [[] for _ in range(max(line.devices) + 1)]
        self.now = 0.0
        self._ready: list[list[tuple[int, int]]] = [[] for _ in self.ranks]
        self._is_free = [True] * len(self.ranks)
        self._missing = [list(line.num_inputs) for _ in range(line.count)]
        self._left = [len(line.devices)] * line.count
        self._events: list[tuple[float, int, int, int]] = []
        self._entered = self._oldest = 0

    def step(self, window: int) -> bool:
        """Let microbatches enter, start what can be started, and go on to the next event; whether
        there was one."""
        line = self.line
        while self._entered < min(line.count, self._oldest + window):
            for piece, inputs in enumerate(line.num_inputs):
                if not inputs:
                    self._arrived(self._entered, piece)
            self._entered += 1
        for rank, waiting in enumerate(self._ready):
            if self._is_free[rank] and waiting:
                microbatch, piece = heapq.heappop(waiting)
                self._is_free[rank] = False
                self.ranks[rank].append(Action(ActionKind.FORWARD, piece, microbatch))
                end = self.now + line.seconds[piece]
                heapq.heappush(self._events, (end, 0, microbatch, piece))
        if not self._events:
            return False
        self.now = self._events[0][0]
        while self._events and self._events[0][0] == self.now:
            _, is_arrival, microbatch, piece = heapq.heappop(self._events)
            if is_arrival:
                self._missing[microbatch][piece] -= 1
                if not self._missing[microbatch][piece]:
                    self._arrived(microbatch, piece)
            else:
                self._ended(microbatch, piece)
        return True

    def _arrived(self, microbatch: int, piece: int) -> None:
        heapq.heappush(self._ready[self.line.devices[piece]], (microbatch, piece))

    def _ended(self, microbatch: int, piece: int) -> None:
        self._is_free[self.line.devices[piece]] = True
        for target, delay in self.line.after[piece]:
            heapq.heappush(self._events, (self.now + delay, 1, microbatch, target))
        self._left[microbatch] -= 1
        while self._oldest < self.line.count and not self._left[self._oldest]:
            self._oldest += 1
