"""A clock, processes that wait for events, and work whose speed changes while it is done.

A process is a generator that yields the event which it waits for. What happens at the same time
happens in the order in which it was asked for, so that a run is the same every time.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator

__all__ = ["Clock", "Event", "Process", "Work"]

_NEVER = float("inf")


class Event:
    """Something that happens once; `seconds` is when it did."""

    __slots__ = ("seconds", "waiting")

    def __init__(self) -> None:
        self.seconds: float | None = None
        self.waiting: list[Process] = []


Process = Iterator[Event]


class Work:
    """Something that takes `left` seconds at full speed from when it is first given a speed."""

    __slots__ = ("end", "left", "since", "speed", "version")

    def __init__(self, seconds: float) -> None:
        self.end = Event()
        self.left = seconds
        self.speed = 0.0
        self.since = 0.0
        self.version = 0


class Clock:
    """Time, and what will happen when."""

    def __init__(self) -> None:
        self.now = 0.0
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0

    def run(self) -> None:
        """Let time pass until nothing is left to happen.

        Raises:
            OverflowError: something takes for ever.
        """
        while self._queue:
            self.now, _, call = heapq.heappop(self._queue)
            call()

    def start(self, process: Process) -> None:
        """Let `process` run until it waits for something that has not happened."""
        for event in process:
            if event.seconds is None:
                event.waiting.append(process)
                return

    def happen(self, event: Event) -> None:
        """`event` happens now."""
        event.seconds = self.now
        for process in event.waiting:
            self._at(self.now, lambda process=process: self.start(process))  # type: ignore[misc]
        event.waiting.clear()

    def later(self, seconds: float) -> Event:
        """An event `seconds` from now."""
        event = Event()
        if seconds <= 0.0:
            event.seconds = self.now
        else:
            self._at(self.now + seconds, lambda: self.happen(event))
        return event

    def set_speed(self, work: Work, speed: float) -> None:
        """From now on `work` goes on at `speed`, of full speed 1."""
        if work.end.seconds is not None or (work.version and work.speed == speed):
            return
        if work.version:
            work.left = max(work.left - (self.now - work.since) * work.speed, 0.0)
        work.since, work.speed = self.now, speed
        work.version += 1
        version = work.version
        if speed > 0.0:
            self._at(self.now + work.left / speed, lambda: self._finish(work, version))

    def _finish(self, work: Work, version: int) -> None:
        if work.version == version and work.end.seconds is None:
            self.happen(work.end)

    def _at(self, seconds: float, call: Callable[[], None]) -> None:
        if not seconds < _NEVER:
            raise OverflowError(f"{seconds} s is no time at which something happens")
        heapq.heappush(self._queue, (seconds, self._count, call))
        self._count += 1
