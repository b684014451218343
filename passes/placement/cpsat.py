"""Runs CP-SAT so that the same model gives the same answer: one worker, one strategy at a time.

Which strategy proves a placement model soon differs from model to model, with factors of ten both
ways; a second strategy starts afresh where the first has no answer in its part of the time.
"""

from __future__ import annotations

from enum import Enum
from typing import Any

from ..interrupts import solve_interruptibly

__all__ = ["Outcome", "solve"]

_WORK_A_SECOND = 0.7  # deterministic time for a second: an idle machine does about 1


class Outcome(Enum):
    """How a run ended."""

    FOUND = "a solution"
    INFEASIBLE = "no solution exists"
    UNKNOWN = "no answer in time"


def solve(
    model: Any, *, seconds: float, clauses_share: float, at_most: float | None = None
) -> tuple[Outcome, Any, float]:
    """Outcome and solver of the first of two strategies with an answer, or of the last; seconds
    that the work of both usually takes.

    Args:
        seconds: for both; decides how much work they do.
        at_most: seconds after which they end before that; None: the same.
        clauses_share: part of the time for learning clauses alone; the rest goes to a strategy that
            solves linear relaxations too.
    """
    from ortools.sat.python import cp_model

    spent = 0.0
    longer = 1.0 if at_most is None else max(at_most, 0.01) / max(seconds, 0.01)
    for strategy, share in (("no_lp", clauses_share), ("default_lp", 1 - clauses_share)):
        allowed = max(seconds * share, 0.01)
        solver = cp_model.CpSolver()
        solver.parameters.num_workers = 1
        solver.parameters.subsolvers.append(strategy)
        solver.parameters.random_seed = 0
        solver.parameters.max_time_in_seconds = allowed * longer
        solver.parameters.max_deterministic_time = _WORK_A_SECOND * allowed
        status = solve_interruptibly(solver, model)
        spent += solver.response_proto.deterministic_time / _WORK_A_SECOND
        if status == cp_model.INFEASIBLE:
            return Outcome.INFEASIBLE, solver, spent
        if status in (cp_model.OPTIMAL, cp_model.FEASIBLE):
            return Outcome.FOUND, solver, spent
        assert status == cp_model.UNKNOWN, solver.status_name(status)
    return Outcome.UNKNOWN, solver, spent
