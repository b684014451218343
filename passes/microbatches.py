"""Decides the number of microbatches, if the user does not.

More of them shrink the pipeline's bubble and the activations in flight, fewer keep operators
large and messages few. Divisors of the batch size around four microbatches a stage are priced,
each at its own microbatch size, from many to few; dynamic programming finds a partition for each.
Fewer microbatches never need less memory, so the search ends with the first number that does not
fit, or after one that is much slower than the best, or two that are slower. Ties go to fewer
microbatches. The number chosen is held to the memory by liveness, else the next larger one is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..compiler.ir.counts import divisors
from ..compiler.ir.errors import UsageError
from ..compiler.ir.graph import ValueKind
from ..compiler.ir.plan import Plan
from .context import Context
from .partition.fitting import find_fitting, with_memory
from .partition.from_graph import state_problem
from .partition.prepare import stage_counts, state
from .partition.problem import StageProblem
from .partition.search import SearchLimits, Solution, Tables, estimate
from .partition.statement import Statement

__all__ = ["ChooseMicrobatches", "candidates", "pinned_count"]

_MOST_CANDIDATES = 8
_MUCH = 1.05
_TYPICAL = 1.1  # the additive bound of memory, as a share of the need
_THRESHOLDS = 5


@dataclass(frozen=True, slots=True)
class ChooseMicrobatches:
    """Pass: fills `plan.num_microbatches`."""

    name: str = "microbatches"

    def run(self, plan: Plan, context: Context) -> Plan:
        if plan.num_microbatches:
            return plan
        pinned = pinned_count(plan, context)
        return replace(plan, num_microbatches=pinned or _choose(plan, context))


def pinned_count(plan: Plan, context: Context) -> int | None:
    """The number that the user wants, if any. Raises UsageError if it does not divide the batch."""
    pinned = context.options.num_microbatches
    if pinned is not None and (pinned < 1 or plan.batch_size % pinned):
        raise UsageError(
            f"{pinned} microbatches do not divide a batch of {plan.batch_size}",
            ways_out=(f"legal: {', '.join(map(str, divisors(plan.batch_size)))}",),
        )
    return pinned


def _choose(plan: Plan, context: Context) -> int:
    most = context.options.num_stages or len(plan.cluster.devices)
    batched = any(value.batch_dim is not None for value in context.graph.values_of(ValueKind.INPUT))
    numbers = list(candidates(plan.batch_size, most)) if batched else [1]
    if len(numbers) == 1:
        return numbers[0]
    statement = state(plan, context)
    counts = stage_counts(plan, context, len(statement.units))
    limits = SearchLimits(
        tolerance=context.options.tolerance, num_orders=1, num_thresholds=_THRESHOLDS
    )
    seconds: dict[int, float] = {}
    for number in reversed(numbers):
        problem = with_memory(state_problem(statement, number), _TYPICAL)
        seconds[number] = estimate(problem, counts, limits).seconds
        context.progress(f"{number} microbatches: {seconds[number]:.6g} s a step")
        if math.isinf(seconds[number]) or _past_the_best(list(seconds.values())):
            break
    best = min(seconds, key=lambda number: (seconds[number], number))
    return _first_that_fits(statement, [n for n in numbers if n >= best], counts, limits)


def _past_the_best(seconds: list[float]) -> bool:
    """Whether the last number was much slower than the best, or the last two were slower."""
    best = min(seconds)
    return seconds[-1] > _MUCH * best or best < min(seconds[-2:])


def _first_that_fits(
    statement: Statement, numbers: list[int], counts: tuple[int, ...], limits: SearchLimits
) -> int:
    """The first of `numbers` for which a partition fits by liveness, the last if none does."""
    for number in numbers[:-1]:
        problem = state_problem(statement, number)
        tables = Tables.of(problem, limits)

        def solve(other: StageProblem, tables: Tables = tables) -> Solution:
            return estimate(other, counts, limits, tables)

        if find_fitting(statement, problem, counts, solve) is not None:
            return number
    return numbers[-1]


def candidates(batch_size: int, num_stages: int) -> Iterator[int]:
    """Divisors of the batch size worth pricing: spread around four microbatches a stage."""

    def distance(number: int) -> tuple[float, int]:
        return abs(math.log(number / (4 * num_stages))), number

    near = sorted(divisors(batch_size), key=distance)
    return iter(sorted(near[:_MOST_CANDIDATES]))
