"""When a rank's instructions ran and its communications ended, for a trace of one step.

Collectives inside stages are seen where the host waits for them: on CPUs, in kernels that are not
compiled. On CUDA they are part of what the device does, and the host goes on.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

import torch

from ..compiler.ir.program import AllGather, AllReduce, Instruction, Recv, ReduceScatter, Send
from ..compiler.ir.trace import Lane, TraceEvent, event_name, inner_name
from .clock import busy_clock
from .communicator import Pending

__all__ = ["Recorder"]

_COMMUNICATIONS = (Send, Recv, AllReduce, ReduceScatter, AllGather)


class Recorder:
    """Events of one step of one rank, and `busy_seconds` of all instructions by `busy_clock`.

    Args:
        rank: whose events.
        device: on CUDA, an instruction ends when the stream that computes has done it.
    """

    def __init__(self, rank: int, device: torch.device) -> None:
        self.events: list[TraceEvent] = []
        self.busy_seconds = 0.0
        self._rank = rank
        self._on_host = device.type == "cpu"
        self._action = ""  # the instruction that is executed
        self._clock = busy_clock(device)
        self._under_way: dict[int, tuple[Pending, str, float]] = {}
        self._origin = time.perf_counter()

    def begin(self, instruction: Instruction) -> tuple[float, float]:
        """Seconds since the step began, and the busy clock: `instruction` begins."""
        self._action = event_name(instruction) or ""
        return self._now(), self._clock()

    def _now(self) -> float:
        return time.perf_counter() - self._origin

    def restart(self) -> None:
        """The step begins now."""
        self.events.clear()
        self.busy_seconds = 0.0
        self._under_way.clear()
        self._origin = time.perf_counter()

    def executed(self, instruction: Instruction, began: tuple[float, float]) -> None:
        """An instruction is over; of a communication that has only started, see `started`."""
        begin_seconds, work = began
        self.busy_seconds += self._clock() - work
        name = event_name(instruction)
        if name is not None and not isinstance(instruction, _COMMUNICATIONS):
            self._add(Lane.COMPUTE, name, begin_seconds)

    def started(self, pending: Pending, instruction: Instruction) -> None:
        """A communication is under way."""
        name = event_name(instruction)
        if name is not None:
            self._under_way[id(pending)] = (pending, name, self._now())

    def started_inside(self, pending: Pending, collective: str, ranks: Sequence[int]) -> None:
        """A collective inside the instruction that is executed is under way."""
        if self._on_host:
            name = inner_name(collective, ranks, self._action)
            self._under_way[id(pending)] = (pending, name, self._now())

    def ended(self, pendings: Iterable[Pending]) -> None:
        """These communications were seen to have ended."""
        for pending in pendings:
            entry = self._under_way.pop(id(pending), None)
            if entry is not None:
                _, name, begin_seconds = entry
                self._add(Lane.COMMUNICATION, name, begin_seconds)

    def _add(self, lane: Lane, name: str, begin_seconds: float) -> None:
        self.events.append(TraceEvent(self._rank, lane, name, begin_seconds, self._now()))
