"""Free placement for throughput: a device may run several disconnected pieces.

The search starts from the best contiguous pieces and anneals them. Then CP-SAT is asked for
placements below the best by the gap that is allowed, on the problem that is left when all that
cannot be cut below that value is merged (`reduce`): a placement is the next value to beat, and
none is the proof. What time is left goes to large-neighbourhood search.
"""

from __future__ import annotations

from collections.abc import Sequence

from .anneal import anneal
from .assignment_model import solve_assignment
from .feasibility import no_packing
from .incumbent import Incumbent
from .neighbourhood import improve_few_devices
from .problem import PlacementProblem
from .reduce import below

__all__ = ["any_placement", "search_and_prove"]

_SMALLEST_STEP = 1e-6  # relative; proofs do not try to tell closer values apart
_MOST_VARIABLES = 60_000
_RUNS = 3


def search_and_prove(
    problem: PlacementProblem, slot_of: Sequence[int], best: Incumbent
) -> list[int]:
    """Improve a placement and its bound as far as time allows; the best slots at the end."""
    slots = list(slot_of)
    for run in range(_RUNS):
        if best.done or best.left(0.5) <= 0:
            break
        found, _ = anneal(problem, slots, seconds=best.left(0.5) / 3, seed=run)
        if best.offer(problem, found, "annealing"):
            slots = found
    if not _small(problem):
        return slots
    slots = _ask_below(problem, slots, best, share=0.8)
    slots = improve_few_devices(problem, slots, best, share=1.0)
    return slots


def any_placement(problem: PlacementProblem, best: Incumbent) -> list[int]:
    """A placement of any load, by packing into memory.

    Raises:
        InfeasibleError: there is none, or none was found in the time given.
    """
    finite = problem.times[problem.times < float("inf")]
    highest = float(finite.sum() + problem.fees.sum() + 1)
    answer = solve_assignment(
        problem, highest, precision=0.01, seconds=best.left(0.5), minimise=False
    )
    if answer.slot_of is None:
        raise no_packing(best.workload, problem, proven=answer.infeasible)
    return list(answer.slot_of)


def _ask_below(
    problem: PlacementProblem, slots: list[int], best: Incumbent, *, share: float
) -> list[int]:
    """Ask for less and less, and for the proof that there is none."""
    step = max(0.9 * best.gap, _SMALLEST_STEP)
    aim = max(step, 0.01)
    while not best.done and best.left(share) > 0.05 and aim < 0.5:
        limit = best.value * (1 - aim)
        if limit <= best.bound:
            aim = max(step, aim / 2)
            if best.value * (1 - aim) <= best.bound:
                break
            continue
        answer = _placement_below(problem, limit, step, best.left(share) * 0.4)
        if answer is None:
            best.prove(limit, "CP-SAT over devices")
            if aim <= step:
                break
            aim = max(step, aim / 2)
        elif isinstance(answer, list):
            if not best.offer(problem, answer, "CP-SAT over devices"):
                break
            slots, aim = answer, max(step, 0.01)
        else:
            # no answer in time: a weaker bound is easier to prove
            aim *= 3
    return slots


def _small(problem: PlacementProblem) -> bool:
    pins = sum(map(len, problem.pins))
    per_slot = problem.num_units + len(problem.pins) + pins
    return problem.num_devices * per_slot <= _MOST_VARIABLES


def _placement_below(
    problem: PlacementProblem, limit: float, step: float, seconds: float
) -> list[int] | None | bool:
    """Slots with loads up to the limit; None: there are none; False: no answer in time."""
    reduced = below(problem, limit * (1 + 1e-9), contiguous=False)
    if reduced is None:
        return None
    answer = solve_assignment(
        reduced.problem, limit, precision=step / 20, seconds=seconds, minimise=False
    )
    if answer.infeasible:
        return None
    if answer.slot_of is None:
        return False
    return reduced.expand(list(answer.slot_of))
