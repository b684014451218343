"""Places operators so that the most loaded device has least to do: highest throughput of a stream.

The objective and the constraints are those of Tarnawski et al., "Efficient Algorithms for Device
Placement of DNN Graph Operators" (NeurIPS 2020), for any number of kinds of device.
"""

from __future__ import annotations

from collections.abc import Sequence

from ...compiler.ir.errors import InfeasibleError
from ...compiler.ir.workload import Workload
from .arrangements import search_arrangements
from .feasibility import require_feasible
from .incumbent import Incumbent, Progress
from .problem import PlacementProblem, placement_problem
from .reduction_bound import bound_by_reduction
from .result import PlacementResult
from .throughput_contiguous import prove_pieces, search_pieces
from .throughput_free import any_placement, search_and_prove
from .work_bound import work_bound

__all__ = ["place_throughput"]

_START_SHARE = 0.3  # of the time limit, for the contiguous placement that a free search starts from
_ORDERS_SHARE = 0.45  # of the time limit, until which a free search tries intervals


def place_throughput(
    workload: Workload,
    *,
    contiguous: bool,
    time_limit: float,
    gap: float,
    progress: Progress | None = None,
) -> PlacementResult:
    """Search the placement whose largest device load is least, and prove a bound.

    Args:
        workload: operators, results that they pass on, and devices.
        contiguous: devices follow each other as stages: their graph over forward edges is acyclic.
        time_limit: seconds; kept to within the time that one step takes.
        gap: relative gap between value and bound at which the search stops.
        progress: called with the best value and bound when one of them improves.

    Raises:
        InfeasibleError: no placement satisfies memory, colours and support; the cause has figures.
    """
    best = Incumbent(workload, time_limit=time_limit, gap=gap, progress=progress)
    problem = placement_problem(workload, contiguous=contiguous)
    require_feasible(workload, problem)
    best.prove(work_bound(problem).value, "work alone")
    if contiguous:
        prove_pieces(problem, search_pieces(problem, best), best)
    else:
        search_and_prove(problem, _start(workload, problem, best), best)
    return best.result()


def _start(workload: Workload, problem: PlacementProblem, best: Incumbent) -> list[int]:
    """Slots of the best contiguous placement that is found in a share of the time, if there is one,
    or of better intervals of its orders; else of any placement."""
    first = Incumbent(workload, time_limit=_START_SHARE * best.time_limit, gap=best.gap)
    first.prove(best.bound, best.proved_by)
    pieced = placement_problem(workload, contiguous=True)
    try:
        require_feasible(workload, pieced)
        pieces = search_pieces(pieced, first)
    except InfeasibleError:
        slots = any_placement(problem, best)
        best.offer(problem, slots, "packing")
        bound_by_reduction(problem, best, contiguous=False)
        return search_arrangements(problem, pieced, slots, best, share=_ORDERS_SHARE)
    best.offer(pieced, pieces.slot_of, first.found_by)
    bound_by_reduction(problem, best, contiguous=False)
    slots = _slots(pieced, pieces.slot_of, problem)
    slots = search_arrangements(problem, pieced, slots, best, share=_ORDERS_SHARE)
    if not best.done and first.bound < best.value:
        pieces = prove_pieces(pieced, pieces, first)
        if best.offer(pieced, pieces.slot_of, first.found_by):
            slots = _slots(pieced, pieces.slot_of, problem)
    return slots


def _slots(
    pieced: PlacementProblem, slot_of: Sequence[int], problem: PlacementProblem
) -> list[int]:
    """Slots of a problem's units from those of the contiguous problem's."""
    of_operator = {
        operator: slot
        for members, slot in zip(pieced.members, slot_of, strict=True)
        for operator in members
    }
    return [of_operator[members[0]] for members in problem.members]
