"""Decides in which order devices run their pieces for a stream of microbatches.

List scheduling in predicted time: a device that is free takes, of the pieces whose inputs have
arrived, one of the oldest microbatch, and among those the first. Serving the oldest first keeps a
line that returns to its stations stable at any rate below that of the busiest one (Lu and Kumar,
"Distributed Scheduling Based on Due Dates and Buffer Priorities", 1991), so the busiest device is
never long without work. Microbatches enter only while few are under way: as few as cost no more
than a hundredth of the time that is possible without a limit, since each holds memory.

The order is one of a run that came to its end, so it has no deadlock.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ...compiler.ir.schedule import Action, ActionKind, Schedule

__all__ = ["NAME", "StreamRun", "stream_schedule"]

NAME = "stream"
_WORTH = 1.01  # times the least time, to have fewer microbatches under way


@dataclass(frozen=True, slots=True)
class StreamRun:
    """A schedule and its course in predicted time.

    Args:
        seconds: until all is done.
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
) -> StreamRun:
    """The order of all pieces and microbatches on every device.

    Args:
        devices: of every piece, in a topological order of pieces.
        seconds: of every piece, one microbatch.
        edges: (piece, later piece that reads it) -> seconds on the way.
        num_microbatches: of the stream.
    """
    line = _Line(tuple(devices), tuple(seconds), dict(edges), num_microbatches)
    best = line.run(num_microbatches)
    window = 1
    while window < num_microbatches:
        found = line.run(window)
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
        ranks: list[list[Action]] = [[] for _ in range(max(self.devices) + 1)]
        ready: list[list[tuple[int, int]]] = [[] for _ in ranks]  # (microbatch, piece)
        is_free = [True] * len(ranks)
        missing = [list(self.num_inputs) for _ in range(self.count)]
        left = [len(self.devices)] * self.count
        events: list[
            tuple[float, int, int, int]
        ] = []  # time, 0 end or 1 arrival, microbatch, piece
        entered = oldest = 0
        now = 0.0
        while True:
            while entered < min(self.count, oldest + window):
                for piece, inputs in enumerate(self.num_inputs):
                    if not inputs:
                        heapq.heappush(ready[self.devices[piece]], (entered, piece))
                entered += 1
            for rank, waiting in enumerate(ready):
                if is_free[rank] and waiting:
                    microbatch, piece = heapq.heappop(waiting)
                    is_free[rank] = False
                    ranks[rank].append(Action(ActionKind.FORWARD, piece, microbatch))
                    heapq.heappush(events, (now + self.seconds[piece], 0, microbatch, piece))
            if not events:
                break
            now = events[0][0]
            while events and events[0][0] == now:
                _, kind, microbatch, piece = heapq.heappop(events)
                if kind:
                    missing[microbatch][piece] -= 1
                    if not missing[microbatch][piece]:
                        heapq.heappush(ready[self.devices[piece]], (microbatch, piece))
                    continue
                is_free[self.devices[piece]] = True
                left[microbatch] -= 1
                for target, delay in self.after[piece]:
                    heapq.heappush(events, (now + delay, 1, microbatch, target))
            while oldest < self.count and not left[oldest]:
                oldest += 1
        schedule = Schedule(NAME, len(self.devices), self.count, tuple(map(tuple, ranks)))
        return StreamRun(schedule, now, window)
