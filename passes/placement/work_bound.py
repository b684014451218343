"""A bound from work alone: operators divided over devices in fractions, at no communication.

    minimise T  subject to  sum over k of f[v, k] = 1,  sum over v of times[v, k] f[v, k] <= n_k T,
                            sum over v of sizes[v] f[v, k] <= n_k memory_k,  f >= 0

By duality every choice of weights w >= 0 with sum of n_k w_k = 1 and prices m >= 0 of bytes gives

    T >=   sum over v of min over k of (w_k times[v, k] + m_k sizes[v])
         - sum over k of m_k n_k memory_k

The linear programme is solved in floating point for good weights only; the bound is then computed
from the formula, so that no tolerance of the solver enters it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .feasibility import MEMORY_TOLERANCE
from .problem import Floats, PlacementProblem

__all__ = ["WorkBound", "work_bound"]

_ROUNDING = 1e-12  # relative; sums of floats


@dataclass(frozen=True, slots=True)
class WorkBound:
    """A proven bound, and how it weighs work.

    Args:
        value: no placement has a smaller largest load.
        weights: [kinds] what a unit of time on a device of each kind counts, `w_k` above.
        work: [units] what each unit counts at least, wherever it is: min of `w_k times[v, k]`.
    """

    value: float
    weights: Floats
    work: Floats


def work_bound(problem: PlacementProblem) -> WorkBound:
    """The larger of the bound above and of the time of the slowest unit on its fastest kind."""
    weights, prices = _dual(problem)
    counts = np.array(problem.counts, dtype=np.float64)
    weights = np.maximum(weights, 0.0)
    total = float(counts @ weights)
    weights = weights / total if total > 0 else np.full(len(counts), 1 / counts.sum())
    finite = np.isfinite(problem.memory)
    prices = np.where(finite, np.maximum(prices, 0.0) / (total if total > 0 else 1.0), 0.0)
    work = _least(problem, weights, np.zeros_like(weights))
    capacity = np.where(finite, problem.memory, 0.0) * (1 + MEMORY_TOLERANCE)
    priced = _least(problem, weights, prices).sum()
    bounds = (
        float(problem.times.min(axis=1).max()),
        float(work.sum()),
        float(priced - (prices * counts * capacity).sum()),
    )
    return WorkBound(max(bounds) * (1 - _ROUNDING), weights, work)


def _least(problem: PlacementProblem, weights: Floats, prices: Floats) -> Floats:
    """[units] weighted time and priced bytes on the kind where they are least."""
    weighted = np.full_like(problem.times, np.inf)
    np.multiply(problem.times, weights, out=weighted, where=np.isfinite(problem.times))
    least: Floats = (weighted + prices * problem.sizes[:, None]).min(axis=1)
    return least


def _dual(problem: PlacementProblem) -> tuple[Floats, Floats]:
    """Weights of kinds and prices of bytes at the optimum; alike units are one in the programme."""
    kinds = len(problem.counts)
    if kinds == 1:
        return np.ones(1), np.zeros(1)
    from ortools.linear_solver import pywraplp  # type: ignore[attr-defined]

    rows = np.column_stack([problem.times, problem.sizes])
    types, number = np.unique(rows, axis=0, return_counts=True)
    time_scale = max(float(problem.times[np.isfinite(problem.times)].max()), 1e-300)
    size_scale = max(float(problem.sizes.max()), 1e-300)
    solver = pywraplp.Solver.CreateSolver("GLOP")
    solver.set_time_limit(10_000)
    largest = solver.NumVar(0, solver.infinity(), "T")
    solver.Minimize(largest)
    work = [solver.Constraint(-solver.infinity(), 0.0, f"work_{k}") for k in range(kinds)]
    memory = []
    for k, limit in enumerate(problem.memory):
        work[k].SetCoefficient(largest, -problem.counts[k])
        bounded = limit * problem.counts[k] / size_scale
        high = bounded if math.isfinite(limit) else solver.infinity()
        memory.append(solver.Constraint(-solver.infinity(), high, f"memory_{k}"))
    for row, n in zip(types, number, strict=True):
        whole = solver.Constraint(float(n), float(n), "assigned")
        for k in range(kinds):
            if math.isfinite(row[k]):
                part = solver.NumVar(0, solver.infinity(), "f")
                whole.SetCoefficient(part, 1)
                work[k].SetCoefficient(part, row[k] / time_scale)
                memory[k].SetCoefficient(part, row[-1] / size_scale)
    if solver.Solve() != pywraplp.Solver.OPTIMAL:
        return np.ones(kinds), np.zeros(kinds)
    weights = np.array([-one.dual_value() for one in work])
    prices = np.array([-one.dual_value() for one in memory]) * time_scale / size_scale
    return weights, prices
