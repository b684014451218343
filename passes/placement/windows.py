"""What arcs and work leave open: which units others wait for, which stages a unit can be at."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .problem import PlacementProblem
from .work_bound import work_bound

__all__ = ["Windows", "reaches", "windows"]

Bits = npt.NDArray[np.bool_]
Windows = list[tuple[int, int]]


def windows(problem: PlacementProblem, limit: float) -> Windows | None:
    """First and last stage of every unit; None: some unit has none.

    The work of a unit and all before it (weighed as in `work_bound`, so that a device of kind k
    takes at most `w_k * limit`) needs some number of devices, however the kinds follow each other.
    """
    bound = work_bound(problem)
    ahead = reaches(problem).astype(np.float64)
    last = problem.num_devices - 1
    first = np.zeros(problem.num_units, dtype=np.int64)
    final = np.full(problem.num_units, last)
    equal = problem.times.min(axis=1)
    for weights, work in (
        (bound.weights, bound.work),
        (np.ones(len(problem.counts)), equal),
    ):
        each = sorted((w for w, n in zip(weights, problem.counts, strict=True) for _ in range(n)))
        capacity = np.cumsum(each[::-1]) * limit * (1 + 1e-9)
        first = np.maximum(first, np.searchsorted(capacity, ahead.T @ work))
        final = np.minimum(final, last - np.searchsorted(capacity, ahead @ work))
    if (first > final).any():
        return None
    return list(zip(first.tolist(), final.tolist(), strict=True))


def reaches(problem: PlacementProblem) -> Bits:
    """[units, units] True where a path leads from the row to the column, or they are equal."""
    size = problem.num_units
    after: list[list[int]] = [[] for _ in range(size)]
    waiting = [0] * size
    for u, v in problem.arcs:
        after[u].append(v)
        waiting[v] += 1
    order = [v for v in range(size) if not waiting[v]]
    for u in order:
        for v in after[u]:
            waiting[v] -= 1
            if not waiting[v]:
                order.append(v)
    reach = np.eye(size, dtype=np.bool_)
    for u in reversed(order):
        for v in after[u]:
            reach[u] |= reach[v]
    return reach
