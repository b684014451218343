"""Runs CP-SAT so that the same model gives the same answer: one worker, one strategy at a time.

Which strategy proves a placement model soon differs from model to model, with factors of ten both
ways; a second strategy starts afresh where the first has no answer in its part of the time.
"""

from __future__ import annotations

from enum import Enum
from typing import Any

__all__ = ["CLAUSES", "RELAXATION", "Outcome", "solve"]

CLAUSES, RELAXATION = "no_lp", "default_lp"  # names of CP-SAT's strategies
_FIRST_SHARE = 0.7  # of the time, for the first of two strategies
_WORK_A_SECOND = 0.7  # deterministic time for a second: an idle machine does about 1


class Outcome(Enum):
    """How a run ended."""

    FOUND = "a solution"
    INFEASIBLE = "no solution exists"
    UNKNOWN = "no answer in time"


def solve(model: Any, *, seconds: float, strategies: tuple[str, str]) -> tuple[Outcome, Any]:
    """Outcome and solver of the first of two strategies with an answer, or of the last."""
    from ortools.sat.python import cp_model

    for strategy, share in zip(strategies, (_FIRST_SHARE, 1 - _FIRST_SHARE), strict=True):
        allowed = max(seconds * share, 0.01)
        solver = cp_model.CpSolver()
        solver.parameters.num_workers = 1
        solver.parameters.subsolvers.append(strategy)
        solver.parameters.random_seed = 0
        solver.parameters.max_time_in_seconds = allowed
        solver.parameters.max_deterministic_time = _WORK_A_SECOND * allowed
        status = solver.solve(model)
        if status == cp_model.INFEASIBLE:
            return Outcome.INFEASIBLE, solver
        if status in (cp_model.OPTIMAL, cp_model.FEASIBLE):
            return Outcome.FOUND, solver
        assert status == cp_model.UNKNOWN, solver.status_name(status)
    return Outcome.UNKNOWN, solver
