"""Free placement for throughput: a device may run several disconnected pieces.

The search starts from the best contiguous pieces, divides merged operators anew (`coarsen`),
anneals, and bounds what devices can hold (`cover_bound`). Then CP-SAT is asked for placements below
the best by the gap that is allowed, on the problem that is left when all that cannot be cut below
that value is merged (`reduce`): a placement is the next value to beat, and none is the proof. What
time is left goes to large-neighbourhood search.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from .anneal import anneal
from .assignment_model import solve_assignment
from .coarsen import search_coarse
from .cover_bound import DeviceCovers
from .descent import SMALLEST_STEP, Answer, descend
from .feasibility import MEMORY_TOLERANCE, no_packing
from .incumbent import Incumbent
from .load_table import LoadTable
from .neighbourhood import improve_few_devices
from .problem import PlacementProblem
from .reduce import MOST_TO_REDUCE, below

__all__ = ["any_placement", "improve_merged", "search_and_prove"]

_METHOD = "CP-SAT over devices"
_MOST_VARIABLES, _VARIABLES_A_SECOND = 60_000, 6_000  # building them takes time, too
_LEVELS = (1.0, 0.3, 0.6, 0.9, 1.0)  # between bound and value
_COARSE_SHARE = 0.15  # of the time limit
_UNTIL_OF_LARGE = 0.9  # of the time limit, for graphs on which nothing else is tried
_FIRST_COVERS_SHARE, _COVERS_SHARE = 0.3, 0.7  # of the time limit, until which it tries
_ANNEAL_SHARE, _ANNEAL_SHARE_OF_LARGE = 0.2, 0.6  # of the time limit


def improve_merged(
    problem: PlacementProblem,
    covers: DeviceCovers,
    slot_of: Sequence[int],
    best: Incumbent,
    *,
    until: float,
) -> list[int]:
    """Improve a placement by moving what is merged, and the bound by covers; the best slots.

    Args:
        covers: bounds of the problem.
        until: share of the time limit at which it ends at the latest.
    """
    slots = list(slot_of)
    if problem.num_units > MOST_TO_REDUCE:
        return _anneal_merged(problem, slots, best, until=_UNTIL_OF_LARGE)
    covers.prove(best, share=_FIRST_COVERS_SHARE, halve=False)
    if best.done:
        return slots
    slots = search_coarse(problem, slots, best, share=_COARSE_SHARE)
    slots = _anneal_merged(problem, slots, best, until=until)
    covers.prove(best, share=until, halve=True)
    return slots


def search_and_prove(
    problem: PlacementProblem, covers: DeviceCovers, slot_of: Sequence[int], best: Incumbent
) -> list[int]:
    """Improve a placement and its bound as far as time allows; the best slots at the end."""
    if problem.num_units > MOST_TO_REDUCE:
        return list(slot_of)
    covers.prove(best, share=_COVERS_SHARE, halve=True)
    slots = _ask_below(problem, list(slot_of), best, share=0.8)
    return improve_few_devices(problem, slots, best, share=1.0)


def any_placement(problem: PlacementProblem, best: Incumbent) -> list[int]:
    """A placement of any load, by packing into memory.

    Raises:
        InfeasibleError: there is none, or none was found in the time given.
    """
    packed = _largest_first(problem)
    if packed is not None:
        return packed
    if not _small(problem):
        raise no_packing(best.workload, problem, contiguous=False, proven=False)
    finite = problem.times[problem.times < float("inf")]
    highest = float(finite.sum() + problem.fees.sum() + 1)
    answer = solve_assignment(
        problem, highest, precision=0.01, seconds=best.left(0.5), minimise=False
    )
    if answer.slot_of is None:
        raise no_packing(best.workload, problem, contiguous=False, proven=answer.infeasible)
    return list(answer.slot_of)


def _largest_first(problem: PlacementProblem) -> list[int] | None:
    """Units by falling size, each where it ends first among the slots that can hold it."""
    limits = problem.memory[list(problem.slots)] * (1 + MEMORY_TOLERANCE)
    times = problem.times[:, list(problem.slots)]
    load, used = np.zeros(problem.num_devices), np.zeros(problem.num_devices)
    slots = [0] * problem.num_units
    for unit in np.argsort(-problem.sizes, kind="stable").tolist():
        ends = np.where(used + problem.sizes[unit] <= limits, load + times[unit], np.inf)
        slot = int(np.argmin(ends))
        if not np.isfinite(ends[slot]):
            return None
        slots[unit] = slot
        load[slot] += times[unit, slot]
        used[slot] += problem.sizes[unit]
    return slots


def _anneal_merged(
    problem: PlacementProblem, slots: list[int], best: Incumbent, *, until: float
) -> list[int]:
    """Anneal the problem, and what it is reduced to below values that may be reached.

    Where results are large, single units cannot leave their neighbours; what is merged can.
    """
    share = _ANNEAL_SHARE if _small(problem) else _ANNEAL_SHARE_OF_LARGE
    low, high = best.bound, best.value
    for run, level in enumerate(_LEVELS):
        reduced = below(problem, low + level * (high - low), contiguous=False)
        if best.done or reduced is None:
            continue
        start = [0] * reduced.problem.num_units
        for unit, merged in enumerate(reduced.label):
            start[merged] = slots[unit]
        if not LoadTable(reduced.problem, start).legal:
            continue
        found, _ = anneal(
            reduced.problem,
            start,
            seconds=share / len(_LEVELS) * best.time_limit,
            at_most=best.left(until),
            seed=run,
        )
        expanded = reduced.expand(found)
        if best.offer(problem, expanded, "annealing"):
            slots = expanded
    return slots


def _ask_below(
    problem: PlacementProblem, slots: list[int], best: Incumbent, *, share: float
) -> list[int]:
    """Ask for less and less, and for the proof that there is none."""
    kept = slots

    def take(found: list[int]) -> bool:
        nonlocal kept
        better = best.offer(problem, found, _METHOD)
        kept = found if better else kept
        return better

    descend(
        best,
        lambda limit, seconds: _placement_below(problem, limit, best.gap, seconds),
        take,
        method=_METHOD,
        first_aim=0.01,
        share=share,
        share_each=0.4,
    )
    return kept


def _small(problem: PlacementProblem, seconds: float = math.inf) -> bool:
    """Whether the model of a problem is worth building in so many seconds."""
    pins = sum(map(len, problem.pins))
    per_slot = problem.num_units + len(problem.pins) + pins
    return problem.num_devices * per_slot <= min(_MOST_VARIABLES, _VARIABLES_A_SECOND * seconds)


def _placement_below(
    problem: PlacementProblem, limit: float, gap: float, seconds: float
) -> Answer[list[int]]:
    reduced = below(problem, limit * (1 + 1e-9), contiguous=False)
    if reduced is None:
        return Answer(None, none_exists=True)
    if not _small(reduced.problem, seconds):
        return Answer(None, none_exists=False)
    answer = solve_assignment(
        reduced.problem,
        limit,
        precision=max(gap, SMALLEST_STEP) / 20,
        seconds=seconds,
        minimise=False,
    )
    slots = None if answer.slot_of is None else reduced.expand(list(answer.slot_of))
    return Answer(slots, none_exists=answer.infeasible)
