"""The best placement for latency and the best bound so far, with the clock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...compiler.ir.workload import Workload
from ...cost_models.placement import latency, piece_latency, violations
from .incumbent import Progress, SearchState
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


class LatencyIncumbent(SearchState):
    """Keeps what a search has found; values are computed on the original graph.

    Args:
        workload: the original graph.
        contiguous: a machine runs one piece.
        time_limit: seconds from the beginning.
        gap: relative gap at which the search may stop.
        progress: told of improvements.
        begin: `time.monotonic()` at the beginning; None: now.
    """

    def __init__(
        self,
        workload: Workload,
        *,
        contiguous: bool,
        time_limit: float,
        gap: float,
        progress: Progress | None,
        begin: float | None = None,
    ) -> None:
        super().__init__(workload, time_limit=time_limit, gap=gap, progress=progress, begin=begin)
        self.contiguous = contiguous
        self.pieces: Pieces | None = None

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
