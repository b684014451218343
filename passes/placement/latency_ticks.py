"""A latency problem in whole numbers for CP-SAT, rounded so that proofs stay valid.

Times and fees are rounded down: every placement of the true problem has at most its value in the
rounded one. Sizes are rounded down and memory up, unless all sizes are whole bytes, which are kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..interrupts import solve_interruptibly
from .latency_problem import LatencyProblem

__all__ = ["Effort", "Found", "Linear", "Program", "Ticks", "solve"]

_FINE, _COARSE = 1 << 24, 1 << 20  # ticks in the scale; the fine ones take longer to solve
_FEW_UNITS = 100
_MOST_BYTES = 1 << 50
_MEMORY_TOLERANCE = 1e-9  # as in the evaluation
Linear = Any  # an OR-Tools linear expression, or an int


@dataclass(frozen=True)
class Ticks:
    """Rounding of one problem.

    Args:
        per_time: ticks in a unit of the workload's time.
        horizon: ticks that the best known value has; nothing worse is of interest.
    """

    problem: LatencyProblem
    per_time: float
    horizon: int

    @staticmethod
    def of(problem: LatencyProblem, value: float) -> Ticks:
        """Ticks for placements of at most `value`; infinite: for all placements."""
        if math.isinf(value):
            value = sum(
                max((t for t in row if t is not None), default=0.0) for row in problem.times
            )
            value += sum(max(net.fees) * (1 + len(net.readers)) for net in problem.nets)
        ticks = _FINE if problem.num_units <= _FEW_UNITS else _COARSE
        return Ticks(problem, ticks / (value or 1.0), ticks)

    def time(self, amount: float) -> int:
        """A time in ticks; what exceeds the horizon is not told apart."""
        return min(math.floor(amount * self.per_time), self.horizon + 1)

    def memory(self) -> tuple[list[int], list[int | None]]:
        """Sizes of all units and limits of all kinds (None: none) in whole numbers."""
        sizes = self.problem.sizes
        whole = all(size == math.floor(size) for size in sizes) and sum(sizes) < _MOST_BYTES
        scale = 1.0 if whole else (1 << 40) / sum(sizes)
        limits: list[int | None] = []
        for kind in range(len(self.problem.workload.kinds)):
            limit = self.problem.limit(kind) * (1 + _MEMORY_TOLERANCE) * scale
            if limit >= sum(sizes) * scale:
                limits.append(None)
            else:
                limits.append(math.floor(limit) if whole else math.ceil(limit))
        return [math.floor(size * scale) for size in sizes], limits


@dataclass(frozen=True, slots=True)
class Found:
    """What a solution of a program says.

    Args:
        device_of: device of every unit.
        order: units in the order in which machines take them up, where the program decides it.
    """

    device_of: tuple[int, ...]
    order: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Program:
    """A built program: CP-SAT's model, its rounding, and how to read a solution."""

    model: Any
    ticks: Ticks
    decode: Callable[[Callable[[Linear], int]], Found]


@dataclass(frozen=True, slots=True)
class Effort:
    """How hard to solve: seconds of wall time, the relative gap to stop at, threads, the seed."""

    seconds: float
    gap: float
    workers: int
    seed: int


def solve(
    program: Program,
    effort: Effort,
    on_solution: Callable[[Found], None],
    on_bound: Callable[[float], None],
) -> bool:
    """Solve; whether the program was proven to have no solution.

    Args:
        on_solution: given every solution found, each better than the one before in ticks.
        on_bound: given the bounds proven, in the workload's time.
    """
    from ortools.sat.python import cp_model

    class Watch(cp_model.CpSolverSolutionCallback):
        def on_solution_callback(self) -> None:
            on_solution(program.decode(lambda e: e if isinstance(e, int) else self.value(e)))

    solver = cp_model.CpSolver()
    solver.parameters.num_workers = effort.workers
    solver.parameters.random_seed = effort.seed
    solver.parameters.max_time_in_seconds = max(effort.seconds, 0.01)
    solver.parameters.relative_gap_limit = effort.gap
    solver.best_bound_callback = lambda ticks: on_bound(ticks / program.ticks.per_time)
    status = solve_interruptibly(solver, program.model, Watch())
    if status == cp_model.INFEASIBLE:
        return True
    assert status in (cp_model.OPTIMAL, cp_model.FEASIBLE, cp_model.UNKNOWN), status
    on_bound(solver.best_objective_bound / program.ticks.per_time)
    return False
