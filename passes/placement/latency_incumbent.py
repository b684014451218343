"""The best placement for latency and the best bound so far, with the clock."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

from ...compiler.ir.workload import Workload
from ...cost_models.placement import latency, piece_latency, violations
from .incumbent import Progress
from .latency_pieces import joined_pieces
from .result import PlacementResult

__all__ = ["LatencyIncumbent", "LatencyResult", "Pieces"]

Pieces = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class LatencyResult(PlacementResult):
    """A placement for latency.

    Args:
        pieces: operators that a machine runs together, in the order in which machines take them
            up; None: every machine runs one piece.
    """

    pieces: Pieces | None = None


class LatencyIncumbent:
    """Keeps what a search has found; values are computed on the original graph.

    Args:
        workload: the original graph.
        contiguous: a machine runs one piece.
        time_limit: seconds from now.
        gap: relative gap at which the search may stop.
        progress: told of improvements.
    """

    def __init__(
        self,
        workload: Workload,
        *,
        contiguous: bool,
        time_limit: float,
        gap: float,
        progress: Progress | None,
    ) -> None:
        self.workload, self.contiguous = workload, contiguous
        self.time_limit, self.gap, self.progress = time_limit, gap, progress
        self.begin = time.monotonic()
        self.placement: tuple[int, ...] | None = None
        self.pieces: Pieces | None = None
        self.value = math.inf
        self.bound = 0.0
        self.found_by = self.proved_by = ""

    @property
    def seconds(self) -> float:
        """Time since the search began."""
        return time.monotonic() - self.begin

    def left(self, share: float = 1.0) -> float:
        """Seconds until a share of the time limit is over; at least 0."""
        return max(0.0, share * self.time_limit - self.seconds)

    @property
    def done(self) -> bool:
        """The gap is closed as far as asked for."""
        return self.placement is not None and self.value - self.bound <= self.gap * self.value

    def offer(
        self, placement: Sequence[int], pieces: Sequence[Sequence[int]] | None, method: str
    ) -> bool:
        """Take a placement, with its pieces where they are free, if it is better; whether it was.

        A placement that breaks a constraint is never taken.
        """
        if violations(self.workload, placement):
            return False
        if self.contiguous:
            value, kept = latency(self.workload, placement), None
        else:
            assert pieces is not None
            kept = tuple(map(tuple, pieces))
            value = piece_latency(self.workload, placement, kept)
        if value is None or value >= self.value:
            return False
        self.placement, self.pieces = tuple(placement), kept
        self.value, self.found_by = value, method
        self._tell()
        return True

    def prove(self, bound: float, method: str) -> bool:
        """Take a bound if it is higher; whether it was. It ends at the value, which is reached."""
        bound = min(bound, self.value)
        if bound <= self.bound:
            return False
        self.bound, self.proved_by = bound, method
        self._tell()
        return True

    def result(self) -> LatencyResult:
        """What was found; there must be a placement."""
        assert self.placement is not None
        if self.pieces is not None:
            self.pieces = joined_pieces(self.workload, self.placement, self.pieces)
            value = piece_latency(self.workload, self.placement, self.pieces)
            assert value is not None
            self.value = value
        return LatencyResult(
            self.placement,
            self.value,
            min(self.bound, self.value),
            self.seconds,
            f"placement by {self.found_by}, bound by {self.proved_by or 'nothing'}",
            self.pieces,
        )

    def _tell(self) -> None:
        if self.progress is not None and self.placement is not None:
            self.progress(self.value, min(self.bound, self.value))
