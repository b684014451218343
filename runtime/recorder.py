"""When a rank's instructions ran and its communications ended, for a trace of one step."""

from __future__ import annotations

import time
from collections.abc import Iterable

import torch

from ..compiler.ir.program import AllGather, AllReduce, Instruction, Recv, ReduceScatter, Send
from ..compiler.ir.trace import Lane, TraceEvent, event_name
from .communicator import Pending

__all__ = ["Recorder"]

_COMMUNICATIONS = (Send, Recv, AllReduce, ReduceScatter, AllGather)


class Recorder:
    """Events of one step of one rank.

    Args:
        rank: whose events.
        device: on CUDA, an instruction ends when the stream that computes has done it. The device
            as a whole is not waited for: a receive under way may need what is yet to be computed.
    """

    def __init__(self, rank: int, device: torch.device) -> None:
        self.events: list[TraceEvent] = []
        self._rank = rank
        self._device = device
        self._under_way: dict[int, tuple[Pending, str, float]] = {}
        self._origin = time.perf_counter()

    def now(self) -> float:
        """Seconds since the step began."""
        return time.perf_counter() - self._origin

    def restart(self) -> None:
        """The step begins now."""
        self.events.clear()
        self._under_way.clear()
        self._origin = time.perf_counter()

    def executed(self, instruction: Instruction, begin_seconds: float) -> None:
        """An instruction that began at `begin_seconds` is over (communications: `started`)."""
        name = event_name(instruction)
        if name is None or isinstance(instruction, _COMMUNICATIONS):
            return
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        self._add(Lane.COMPUTE, name, begin_seconds)

    def started(self, pending: Pending, instruction: Instruction) -> None:
        """A communication is under way."""
        name = event_name(instruction)
        if name is not None:
            self._under_way[id(pending)] = (pending, name, self.now())

    def ended(self, pendings: Iterable[Pending]) -> None:
        """These communications were seen to have ended."""
        for pending in pendings:
            entry = self._under_way.pop(id(pending), None)
            if entry is not None:
                _, name, begin_seconds = entry
                self._add(Lane.COMMUNICATION, name, begin_seconds)

    def _add(self, lane: Lane, name: str, begin_seconds: float) -> None:
        self.events.append(TraceEvent(self._rank, lane, name, begin_seconds, self.now()))
