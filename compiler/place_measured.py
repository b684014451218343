"""Place operators by times that were measured where they run, and again until that changes nothing.

What an operator takes depends on its neighbours: measured in the run of the whole graph it finds
other things in caches than among the operators of its device, and a search picks those whose times
happened to be measured low. So what was placed is measured in place and the placement priced by
that, and operators are placed again by the same figures. Where that is hardly better, the first of
the two is taken: its own operators are measured where they are. With the certificate of the second
search, its value is compared with a bound by the same times.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from ..passes.context import Context, Measured, PlanOptions
from ..passes.place import priced_again
from .ir.errors import InfeasibleError
from .ir.graph import Graph
from .ir.plan import Objective, Plan

__all__ = ["Times", "place_measured"]

_ROUNDS = 3
_WORTH = 0.98  # of the busiest device's time, to take a placement that is not measured in place


class Times(Protocol):
    """What measures; see `NodeTimes`."""

    def everywhere(self) -> Measured: ...

    def in_place(self, plan: Plan) -> Measured: ...


def place_measured(
    graph: Graph,
    options: PlanOptions,
    times: Times,
    search: Callable[[PlanOptions], Plan],
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
    best: tuple[Plan, Measured] | None = None
    for number in range(_ROUNDS):
        say(f"measure operators where they were placed, round {number + 1}")
        measured = times.in_place(plan)
        now = replace(options, measured=measured)
        found = search(now)
        try:
            held = _bounded(priced_again(plan, Context(graph, now)), found)
        except InfeasibleError:  # the order of its pieces is another now, and needs more memory
            plan = found
            continue
        if best is None or _busiest(held) < _busiest(best[0]):
            best = held, measured
        if _busiest(found) > _WORTH * _busiest(held):
            break
        plan = found
    return best or (found, measured)


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
