"""Cuts one order of units into runs, one a stage, where every stage has prices of its own.

With f_s(a, b) the seconds that stage s adds to the way of the first microbatch if it has the units
from a to before b, and v_s(a, b) those that it takes for all others and once a step,

    step = sum_s f_s + max_s v_s

is minimised. Under a limit of the maximum the least sum follows by dynamic programming over the
ends of runs; the limit then falls below the maximum that was found, until the sum alone is no
better than the best step. What lies between two limits has no smaller sum and no smaller maximum
than the runs found there, so the best is found.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["Table", "best_runs"]

Table = npt.NDArray[np.float64]  # by first unit of a run and the first after it


def best_runs(
    tables: Sequence[tuple[Table, Table]],
    forbidden: Iterable[tuple[int, int, int]] = (),
) -> tuple[tuple[int, int], ...] | None:
    """First unit and the first after the last, of each stage's run; None if nothing is allowed.

    Args:
        tables: of each stage, f and v.
        forbidden: (stage, a, b): neither this run nor one that contains it.
    """
    tops = [top for _, top in tables]
    sums = []
    for first_way, _ in tables:
        upper = np.triu(np.ones_like(first_way, dtype=bool), 1)
        sums.append(np.where(upper, first_way, math.inf))
    for stage, first, last in forbidden:
        sums[stage][: first + 1, last:] = math.inf
    best, chosen, limit = math.inf, None, math.inf
    while True:
        allowed = [
            np.where(top < limit, own, math.inf) for own, top in zip(sums, tops, strict=True)
        ]
        least, runs = _least_sum(allowed)
        if runs is None or least >= best:
            return chosen
        limit = max(float(top[run]) for top, run in zip(tops, runs, strict=True))
        if least + limit < best:
            best, chosen = least + limit, runs


def _least_sum(
    sums: Sequence[Table],
) -> tuple[float, tuple[tuple[int, int], ...] | None]:
    """The runs of all units with the least sum of seconds."""
    size = len(sums[0])
    reached = np.full(size, math.inf)
    reached[0] = 0.0
    before: list[npt.NDArray[np.intp]] = []
    for own in sums:
        total = reached[:, None] + own
        before.append(total.argmin(axis=0))
        reached = total.min(axis=0)
    if not math.isfinite(reached[-1]):
        return math.inf, None
    runs: list[tuple[int, int]] = []
    last = size - 1
    for choice in reversed(before):
        first = int(choice[last])
        runs.append((first, last))
        last = first
    return float(reached[-1]), tuple(reversed(runs))
