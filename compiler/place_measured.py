"""Place operators by times that were measured where they run, and keep what is fastest in turns.

What an operator takes depends on its neighbours: measured in the run of the whole graph it finds
other things in caches than among the operators of its device, and a search picks those whose times
happened to be measured low. So what was placed is measured in place, and operators are placed again
by these figures. A machine has slow moments, too, in which all is measured slow: of placements that
were measured at different times, the best would be that of the best moment. So in the end all
placements that were found, one piece a device and equal numbers of operators are measured in
turns, and each is priced by its own figures. The best of these prices is the result. By the same
figures is the bound that it is compared with, of a last search.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Protocol

from ..passes.context import Context, Measured, PlanOptions
from ..passes.equal_split import equal_split
from ..passes.place import preferred, priced_again
from .ir.errors import InfeasibleError
from .ir.graph import Graph
from .ir.plan import Objective, Plan
from .words import plural

__all__ = ["Times", "place_measured"]

_ROUNDS = 2
_SHARE = 0.25  # of the time to place, for one piece a device and for the last bound
_WORTH = 0.98  # of the busiest device's time, to go on

Search = Callable[[PlanOptions], Plan]


class Times(Protocol):
    """What measures; see `NodeTimes`."""

    def everywhere(self) -> Measured: ...

    def in_place(self, plans: Sequence[Plan]) -> list[Measured]: ...


def place_measured(
    graph: Graph,
    options: PlanOptions,
    times: Times,
    search: Search,
    say: Callable[[str], None],
) -> tuple[Plan, Measured]:
    """The best placement found, and the times that it is priced by.

    Args:
        search: places by the options that it is given.
        say: receives one line a phase.

    Raises:
        NotMeasured: see `NodeTimes`.
    """
    say("measure operators on every device")
    measured = times.everywhere()
    plan = search(replace(options, measured=measured))
    if options.objective is not Objective.THROUGHPUT:
        return plan, measured  # of one sample, devices do not run side by side
    found = [plan]
    for number in range(_ROUNDS):
        say(f"measure operators where they were placed, round {number + 1}")
        (measured,) = times.in_place(found[-1:])
        now = replace(options, measured=measured)
        found.append(search(now))
        held = _priced(found[-2], Context(graph, now))
        if held is not None and _busiest(found[-1]) > _WORTH * _busiest(held):
            break
    plans = _distinct([*found, *_simple(found[-1], graph, now, search)])
    say(f"measure {plural(len(plans), 'placement', 's')} in turns")
    known = {
        priced: own
        for plan, own in zip(plans, times.in_place(plans), strict=True)
        if (priced := _priced(plan, Context(graph, replace(options, measured=own)))) is not None
    }
    if not known:  # all of them need more memory in the order that these times lead to
        return found[-1], measured
    best = preferred(list(known))
    last = search(replace(_briefly(options), measured=known[best]))
    return _bounded(best, last), known[best]


def _simple(plan: Plan, graph: Graph, options: PlanOptions, search: Search) -> list[Plan]:
    """One piece a device, and equal numbers of operators, where that is possible."""
    found = [equal_split(plan, Context(graph, options))]
    with suppress(InfeasibleError):
        found.append(search(replace(_briefly(options), contiguous=True)))
    return [plan for plan in found if plan is not None]


def _briefly(options: PlanOptions) -> PlanOptions:
    return replace(options, placement_seconds=_SHARE * options.placement_seconds)


def _distinct(plans: Sequence[Plan]) -> list[Plan]:
    """The first of each placement."""
    return list({plan.stages: plan for plan in reversed(plans)}.values())[::-1]


def _priced(plan: Plan, context: Context) -> Plan | None:
    """By the times of `context`; None: in the order that they lead to it needs too much memory."""
    try:
        return priced_again(plan, context)
    except InfeasibleError:
        return None


def _busiest(plan: Plan) -> float:
    assert plan.prediction is not None
    return max(load.total_seconds for load in plan.prediction.loads)


def _bounded(held: Plan, found: Plan) -> Plan:
    """`held` with what the search that led to `found` has proved by the same times."""
    mine, proof = held.certificate, found.certificate
    assert mine is not None and proof is not None
    bound = min(proof.lower_bound, mine.objective)
    certificate = replace(
        proof,
        objective=mine.objective,
        lower_bound=bound,
        gap=1.0 - bound / mine.objective if mine.objective > 0.0 else 0.0,
    )
    return replace(held, certificate=certificate)
