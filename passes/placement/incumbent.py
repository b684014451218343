"""The best placement and the best bound so far, with the clock: what parts of a search share."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from ...compiler.ir.workload import Workload
from ...cost_models.placement import device_loads, violations
from .problem import PlacementProblem
from .result import PlacementResult

__all__ = ["Incumbent", "Progress", "SearchState"]

Progress = Callable[[float, float], None]
"""Called with the best value and the best bound when one of them improves."""


class SearchState:
    """Best placement, best bound and clock, whatever the objective.

    Args:
        workload: the original graph.
        time_limit: seconds from the beginning.
        gap: relative gap at which the search may stop.
        progress: told of improvements.
        clock_limit: seconds from the beginning; with it, `time_limit` is one of work that parts of
            the search say they have done (`spend`), so that the search is the same on a busy
            machine. The clock only ends it.
        begin: `time.monotonic()` at the beginning; None: now.
    """

    def __init__(
        self,
        workload: Workload,
        *,
        time_limit: float,
        gap: float,
        progress: Progress | None = None,
        clock_limit: float | None = None,
        begin: float | None = None,
    ) -> None:
        self.workload, self.gap, self.progress = workload, gap, progress
        self.begin = time.monotonic() if begin is None else begin
        self.time_limit = time_limit
        self.clock_limit = time_limit if clock_limit is None else clock_limit
        self.counts_work = clock_limit is not None
        self.work = 0.0
        self.placement: tuple[int, ...] | None = None
        self.value = float("inf")
        self.bound = 0.0
        self.found_by = self.proved_by = ""

    @property
    def seconds(self) -> float:
        """Time since the search began."""
        return time.monotonic() - self.begin

    @property
    def clock_left(self) -> float:
        """Seconds until the search has to end; at least 0."""
        return max(0.0, self.clock_limit - self.seconds)

    @property
    def used(self) -> float:
        """Of the time limit: work where that is counted, else time since the search began."""
        return self.work if self.counts_work else self.seconds

    def left(self, share: float = 1.0) -> float:
        """Seconds until a share of the time limit is used; at least 0."""
        if self.counts_work and not self.clock_left:
            return 0.0
        return max(0.0, share * self.time_limit - self.used)

    def spend(self, seconds: float) -> None:
        """Count work by what it usually takes."""
        self.work += seconds

    @property
    def done(self) -> bool:
        """The gap is closed as far as asked for."""
        return self.placement is not None and self.value - self.bound <= self.gap * self.value

    def prove(self, bound: float, method: str) -> bool:
        """Take a bound if it is higher; whether it was. It ends at the value, which is reached."""
        bound = min(bound, self.value)
        if bound <= self.bound:
            return False
        self.bound, self.proved_by = bound, method
        self._tell()
        return True

    def _tell(self) -> None:
        if self.progress is not None and self.placement is not None:
            self.progress(self.value, min(self.bound, self.value))


class Incumbent(SearchState):
    """Keeps what a search for throughput has found; values are those of the original graph."""

    def offer(self, problem: PlacementProblem, slot_of: Sequence[int], method: str) -> bool:
        """Take a placement if it is better; whether it was.

        Rounded sizes may let a solver put too much on a device, so that memory is checked here.
        """
        placement = problem.placement(slot_of)
        value = max(load.total for load in device_loads(self.workload, placement))
        if value >= self.value or violations(self.workload, placement):
            return False
        self.placement, self.value, self.found_by = placement, value, method
        self._tell()
        return True

    def result(self) -> PlacementResult:
        """What was found; there must be a placement."""
        assert self.placement is not None
        return PlacementResult(
            self.placement,
            self.value,
            min(self.bound, self.value),
            self.seconds,
            f"placement by {self.found_by}, bound by {self.proved_by}",
        )
