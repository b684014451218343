"""A bound without search: the largest value below which reduction alone leaves no placement.

Below a low value, large results cannot be cut; what is merged then takes longer than the value, or
the work cannot be divided evenly any more. Bisection finds where that ends.
"""

from __future__ import annotations

from collections.abc import Callable

from .problem import PlacementProblem
from .reduce import below
from .stage_model import windows
from .work_bound import work_bound

__all__ = ["reduction_bound"]

_PRECISION = 1e-3  # relative; of the bisection
_MOST_FOR_WINDOWS = 1500  # units; windows need the transitive closure


def reduction_bound(
    problem: PlacementProblem,
    low: float,
    high: float,
    *,
    contiguous: bool,
    seconds_left: Callable[[], float],
) -> float:
    """A bound between a known one and the value of a placement.

    Args:
        low: bound to start from.
        high: the value of a placement.
        seconds_left: the bisection ends when this is 0.
    """
    gap, enough = high - low, _PRECISION * high
    # most problems gain nothing: look just above the start first
    probe = low + gap * _PRECISION
    while gap > enough and seconds_left() > 0:
        if _impossible_below(problem, probe, contiguous=contiguous):
            low = probe
        else:
            high = probe
        gap = high - low
        probe = low + gap / 2
    return low


def _impossible_below(problem: PlacementProblem, value: float, *, contiguous: bool) -> bool:
    reduced = below(problem, value, contiguous=contiguous)
    if reduced is None or work_bound(reduced.problem).value >= value:
        return True
    small = contiguous and reduced.problem.num_units <= _MOST_FOR_WINDOWS
    return small and windows(reduced.problem, value) is None
