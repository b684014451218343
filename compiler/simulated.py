"""The predicted step of a plan whose programs are at hand: simulated, not the planner's formula.

Planners minimise a closed formula, which is the certificate's objective. It leaves out what one
step of the programs shows: where messages are exposed, who waits for whom, what shares a wire. So a
finished plan carries the simulated step. Of programs of very many instructions it is not worth the
time, and the formula stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..cost_models import Simulation, simulate
from .ir.fingerprint import plan_hash
from .ir.plan import Objective, Plan
from .ir.program import Program

__all__ = ["simulated", "with_simulated_step"]

_MOST_INSTRUCTIONS = 20_000  # of all ranks: a few seconds


def simulated(plan: Plan, programs: Sequence[Program]) -> Simulation | None:
    """The course of a step of `plan`; None where it is not worth the time, or there is no step."""
    size = sum(len(program.instructions) for program in programs)
    if plan.objective is not Objective.STEP or not 0 < size <= _MOST_INSTRUCTIONS:
        return None
    return simulate(programs, cluster=plan.cluster, optimizer=plan.optimizer)


def with_simulated_step(
    plan: Plan, programs: Sequence[Program]
) -> tuple[Plan, tuple[Program, ...]]:
    """`plan` with the step that simulating `programs` gives, and the programs for it."""
    found = simulated(plan, programs)
    if plan.prediction is None or found is None:
        return plan, tuple(programs)
    changed = replace(plan, prediction=replace(plan.prediction, step_seconds=found.step_seconds))
    name = plan_hash(changed)
    return changed, tuple(replace(program, plan_hash=name) for program in programs)
