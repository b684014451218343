"""What ranks did, or should do, and when: the one form of measured and of simulated steps."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

from .program import (
    AllGather,
    AllReduce,
    Backward,
    BackwardInput,
    BackwardWeight,
    ClipGradients,
    Forward,
    GradientNorm,
    Instruction,
    OptimizerStep,
    Recv,
    ReduceScatter,
    Send,
)

__all__ = ["Lane", "TraceEvent", "event_name", "inner_name"]


class Lane(enum.StrEnum):
    """What of a rank is busy."""

    COMPUTE = "compute"
    COMMUNICATION = "communication"


@dataclass(frozen=True, slots=True)
class TraceEvent:
    """Something that a rank did; seconds from the rank's start of the step.

    Args:
        rank: who did it.
        lane: with what.
        name: as `event_name` or `inner_name` calls it.
        begin_seconds, end_seconds: from when until when. A measured communication ends where the
            rank saw that it had ended.
    """

    rank: int
    lane: Lane
    name: str
    begin_seconds: float
    end_seconds: float


_COMPUTATIONS = {Forward: "F", Backward: "B", BackwardInput: "I", BackwardWeight: "W"}


def event_name(instruction: Instruction) -> str | None:
    """A short name, the same in every trace; None: it takes no time of its own.

    >>> event_name(BackwardWeight(0, 3, 1))
    'W 0.3 part 1'
    """
    match instruction:
        case Forward() | Backward() | BackwardInput() | BackwardWeight():
            part = instruction.part if isinstance(instruction, BackwardWeight) else None
            suffix = "" if part is None else f" part {part}"
            kind = _COMPUTATIONS[type(instruction)]
            return f"{kind} {instruction.stage}.{instruction.microbatch}{suffix}"
        case Send():
            return f"send {instruction.register} -> {instruction.peer}"
        case Recv():
            return f"recv {instruction.register} <- {instruction.peer}"
        case AllReduce() | ReduceScatter() | AllGather():
            more = len(instruction.targets) - 1
            several = f" and {more} more" if more else ""
            return f"{type(instruction).__name__} {instruction.targets[0]}{several}"
        case GradientNorm() | ClipGradients() | OptimizerStep():
            return type(instruction).__name__
        case _:
            return None


def inner_name(collective: str, ranks: Sequence[int], action: str) -> str:
    """What a collective over `ranks` inside the action called `action` is called.

    >>> inner_name("all_reduce", (0, 2), "F 0.1")
    'all_reduce over 0,2 in F 0.1'
    """
    return f"{collective} over {','.join(map(str, ranks))} in {action}"
