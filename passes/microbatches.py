"""Decides the number of microbatches, if the user does not.

More of them shrink the pipeline's bubble and the activations in flight, fewer keep operators
large and messages few. Divisors of the batch size around four microbatches a stage are priced,
each at its own microbatch size, from many to few; dynamic programming finds a partition for each.
Fewer microbatches never need less memory, so the search ends with the first number that does not
fit, or after two that are slower than the best. Ties go to fewer microbatches.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..compiler.ir.errors import UsageError
from ..compiler.ir.graph import ValueKind
from ..compiler.ir.plan import Plan
from .context import Context
from .partition.fitting import find_fitting
from .partition.from_graph import state_problem
from .partition.prepare import stage_counts, state
from .partition.search import SearchLimits, estimate

__all__ = ["ChooseMicrobatches", "candidates"]

_MOST_CANDIDATES = 8
_PATIENCE = 2
_THRESHOLDS = 5


@dataclass(frozen=True, slots=True)
class ChooseMicrobatches:
    """Pass: fills `plan.num_microbatches`."""

    name: str = "microbatches"

    def run(self, plan: Plan, context: Context) -> Plan:
        pinned = context.options.num_microbatches
        if pinned is not None:
            if pinned < 1 or plan.batch_size % pinned:
                raise UsageError(
                    f"{pinned} microbatches do not divide a batch of {plan.batch_size}",
                    ways_out=(f"legal: {', '.join(map(str, _divisors(plan.batch_size)))}",),
                )
            return replace(plan, num_microbatches=pinned)
        return replace(plan, num_microbatches=_choose(plan, context))


def _choose(plan: Plan, context: Context) -> int:
    most = context.options.num_stages or len(plan.cluster.devices)
    batched = any(value.batch_dim is not None for value in context.graph.values_of(ValueKind.INPUT))
    numbers = list(candidates(plan.batch_size, most)) if batched and most > 1 else [1]
    if len(numbers) == 1:
        return numbers[0]
    statement = state(plan, context)
    counts = stage_counts(plan, context, len(statement.units))
    limits = SearchLimits(
        tolerance=context.options.tolerance, num_orders=1, num_thresholds=_THRESHOLDS
    )
    best, chosen, slower = math.inf, numbers[-1], 0
    for number in reversed(numbers):
        fit = find_fitting(
            statement,
            state_problem(statement, number),
            counts,
            lambda problem: estimate(problem, counts, limits),
        )
        if fit is None:
            context.progress(f"{number} microbatches do not fit")
            break
        seconds = fit.solution.seconds
        context.progress(f"{number} microbatches: {seconds:.6g} s a step")
        slower = slower + 1 if seconds > best else 0
        if seconds <= best:
            best, chosen = seconds, number
        if slower == _PATIENCE:
            break
    return chosen


def _divisors(number: int) -> Iterator[int]:
    return (divisor for divisor in range(1, number + 1) if number % divisor == 0)


def candidates(batch_size: int, num_stages: int) -> Iterator[int]:
    """Divisors of the batch size worth pricing: spread around four microbatches a stage."""
    divisors = list(_divisors(batch_size))
    near = sorted(divisors, key=lambda number: (abs(math.log(number / (4 * num_stages))), number))
    return iter(sorted(near[:_MOST_CANDIDATES]))
