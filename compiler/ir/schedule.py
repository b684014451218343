"""Pipeline schedules: for each rank, an ordered list of typed actions.

Text form, one rank a line, actions as `F0.3` (stage 0, microbatch 3):

    schedule 1f1b stages=2 microbatches=2
    0: F0.0 F0.1 B0.0 B0.1
    1: F1.0 B1.0 F1.1 B1.1

`B` is the whole backward of a stage; `I` and `W` are its two halves (input gradients, weight
gradients), which zero-bubble schedules order freely.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass

__all__ = ["Action", "ActionKind", "Schedule"]


class ActionKind(enum.Enum):
    FORWARD = "F"
    BACKWARD = "B"
    BACKWARD_INPUT = "I"
    BACKWARD_WEIGHT = "W"


@dataclass(frozen=True, slots=True)
class Action:
    """One stage computation on one microbatch."""

    kind: ActionKind
    stage: int
    microbatch: int

    @staticmethod
    def parse(text: str) -> Action:
        """Inverse of `str`. Raises ValueError on malformed text."""
        match = re.fullmatch(r"([FBIW])(\d+)\.(\d+)", text)
        if match is None:
            raise ValueError(f"not an action: {text!r} (expected e.g. F0.3)")
        return Action(ActionKind(match[1]), int(match[2]), int(match[3]))

    def __str__(self) -> str:
        return f"{self.kind.value}{self.stage}.{self.microbatch}"


@dataclass(frozen=True, slots=True)
class Schedule:
    """Actions of every rank, in execution order; `ranks[r]` belongs to device r of the plan."""

    name: str
    num_stages: int
    num_microbatches: int
    ranks: tuple[tuple[Action, ...], ...]

    @staticmethod
    def parse(text: str) -> Schedule:
        """Inverse of `str`. Raises ValueError on malformed text."""
        header, *lines = text.strip().splitlines()
        match = re.fullmatch(r"schedule (\S+) stages=(\d+) microbatches=(\d+)", header.strip())
        if match is None:
            raise ValueError(f"not a schedule header: {header!r}")
        ranks = []
        for position, line in enumerate(lines):
            rank, colon, actions = line.strip().partition(":")
            if not colon or rank != str(position):
                raise ValueError(f"expected the line of rank {position}, found {line!r}")
            ranks.append(tuple(Action.parse(item) for item in actions.split()))
        return Schedule(match[1], int(match[2]), int(match[3]), tuple(ranks))

    def __str__(self) -> str:
        head = f"schedule {self.name} stages={self.num_stages} microbatches={self.num_microbatches}"
        rows = [
            f"{rank}: {' '.join(map(str, actions))}".rstrip()
            for rank, actions in enumerate(self.ranks)
        ]
        return "\n".join([head, *rows])
