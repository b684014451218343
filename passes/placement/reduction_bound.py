"""A bound without search: the largest value below which reduction alone leaves no placement.

Below a low value, large results cannot be cut; what is merged then takes longer than the value, or
the work cannot be divided evenly any more, or no device has room for a unit with what it cannot be
without. Bisection finds where that ends.
"""

from __future__ import annotations

from collections.abc import Callable

from .incumbent import Incumbent
from .problem import PlacementProblem
from .reduce import below
from .unit_bound import unit_bound
from .windows import windows
from .work_bound import work_bound

__all__ = ["bound_by_reduction", "reduction_bound"]

_PRECISION = 1e-4  # relative; of the bisection
_FIRST = 1e-3  # of the range
_SHARE = 0.25  # of the time limit; it takes much less on all but the largest graphs
_UNITS_A_SECOND = 1e4  # of one probe
_MOST_FOR_WINDOWS = 1500  # units; windows need the transitive closure


def bound_by_reduction(problem: PlacementProblem, best: Incumbent, *, contiguous: bool) -> None:
    """Raise the bound of a search that has a placement."""
    if best.done:
        return
    end = min(best.used + _SHARE * best.time_limit, best.time_limit)

    def seconds_left() -> float:
        return min(end - best.used, best.clock_left)

    bound = reduction_bound(
        problem,
        best.bound,
        best.value,
        contiguous=contiguous,
        seconds_left=seconds_left,
        probed=lambda: best.spend(problem.num_units / _UNITS_A_SECOND),
    )
    best.prove(bound, "what cannot be cut")


def reduction_bound(
    problem: PlacementProblem,
    low: float,
    high: float,
    *,
    contiguous: bool,
    seconds_left: Callable[[], float],
    probed: Callable[[], None] = lambda: None,
) -> float:
    """A bound between a known one and the value of a placement.

    Args:
        low: bound to start from.
        high: the value of a placement.
        seconds_left: the bisection ends when this is 0.
        probed: called after each look at a value.
    """
    enough = _PRECISION * high
    # most problems gain nothing, and many of the others everything: look at both ends first
    probes = [high - enough / 2, low + (high - low) * _FIRST]
    while high - low > enough and seconds_left() > 0:
        probe = probes.pop() if probes else (low + high) / 2
        least = _least_below(problem, probe, seconds_left, contiguous=contiguous)
        probed()
        if least >= probe:
            low = probe
        else:
            low, high = max(low, least), probe
    return low


def _least_below(
    problem: PlacementProblem,
    value: float,
    seconds_left: Callable[[], float],
    *,
    contiguous: bool,
) -> float:
    """A bound on all placements of less than a value; at least the value: there are none."""
    reduced = below(problem, value, contiguous=contiguous)
    if reduced is None:
        return value
    least = work_bound(reduced.problem).value
    if least >= value:
        return value
    small = contiguous and reduced.problem.num_units <= _MOST_FOR_WINDOWS
    if small and windows(reduced.problem, value) is None:
        return value
    return max(least, unit_bound(reduced.problem, value, seconds_left=seconds_left))
