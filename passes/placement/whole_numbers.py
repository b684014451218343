"""A placement problem in whole numbers for CP-SAT, rounded so that proofs stay valid.

Times, fees, sizes and limits are rounded down: every placement of the true problem is one of
the rounded problem with at most its load. What is infeasible there is infeasible; what is found
there is computed again in floating point.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .feasibility import MEMORY_TOLERANCE
from .problem import Floats, PlacementProblem

__all__ = ["WholeProblem", "whole_problem"]

_MOST_BYTES = 10**12
_MOST_TIME = 10**9


@dataclass(frozen=True)
class WholeProblem:
    """Rounded figures of `problem`.

    Args:
        scale: whole units of time a unit of the workload's time.
        times: [units][kinds]; None: not supported.
        fees: [nets][kinds].
        sizes: [units].
        memory: [kinds]; None: without limit.
    """

    problem: PlacementProblem
    scale: float
    times: list[list[int | None]]
    fees: list[list[int]]
    sizes: list[int]
    memory: list[int | None]

    def limit(self, value: float) -> int:
        """Largest rounded load of placements of at most a value."""
        return math.floor(value * self.scale)


def whole_problem(problem: PlacementProblem, value: float, precision: float) -> WholeProblem:
    """Rounded so that sums near `value` are off by about the relative `precision` at most."""
    terms = problem.num_units + len(problem.pins)
    goal = min(max(terms / max(precision, 1e-12), 1e5), _MOST_TIME)
    scale = goal / value if value > 0 else 1.0
    bytes_unit = _bytes_unit(problem.sizes)
    return WholeProblem(
        problem,
        scale,
        times=[
            [math.floor(t * scale) if math.isfinite(t) else None for t in row]
            for row in problem.times.tolist()
        ],
        # more than the value is as bad as any more, and keeps the numbers small
        fees=[
            [math.floor(min(c, 2 * value) * scale) for c in row] for row in problem.fees.tolist()
        ],
        sizes=[math.floor(s / bytes_unit) for s in problem.sizes.tolist()],
        memory=[
            math.floor(m / bytes_unit * (1 + MEMORY_TOLERANCE)) if math.isfinite(m) else None
            for m in problem.memory.tolist()
        ],
    )


def _bytes_unit(sizes: Floats) -> float:
    """Bytes of a whole unit: exact where sizes have a common divisor that leaves small numbers."""
    total = float(sizes.sum())
    if total < 2**53 and np.array_equal(sizes, np.floor(sizes)):
        divisor = math.gcd(*(int(size) for size in sizes.tolist())) or 1
        if total / divisor <= _MOST_BYTES:
            return divisor
    return total / _MOST_BYTES
