"""Places operators so that the most loaded device has least to do: highest throughput of a stream.

The objective and the constraints are those of Tarnawski et al., "Efficient Algorithms for Device
Placement of DNN Graph Operators" (NeurIPS 2020), for any number of kinds of device.
"""

from __future__ import annotations

from ...compiler.ir.errors import InfeasibleError
from ...compiler.ir.workload import Workload
from .feasibility import require_feasible
from .incumbent import Incumbent, Progress
from .problem import PlacementProblem, placement_problem
from .reduction_bound import reduction_bound
from .result import PlacementResult
from .throughput_contiguous import prove_pieces, search_pieces
from .throughput_free import any_placement, search_and_prove
from .work_bound import work_bound

__all__ = ["place_throughput"]

_REDUCTION_SHARE = 0.5  # of the time limit; it takes much less on all but the largest graphs
_START_SHARE = 0.2  # of the time limit, for the contiguous placement that a free search starts from


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
        pieces = search_pieces(problem, best)
        _bound_by_reduction(problem, best, contiguous=True)
        prove_pieces(problem, pieces, best)
    else:
        slots = _start(workload, problem, best)
        _bound_by_reduction(problem, best, contiguous=False)
        search_and_prove(problem, slots, best)
    return best.result()


def _bound_by_reduction(problem: PlacementProblem, best: Incumbent, *, contiguous: bool) -> None:
    if not best.done:
        bound = reduction_bound(
            problem,
            best.bound,
            best.value,
            contiguous=contiguous,
            seconds_left=lambda: best.left(_REDUCTION_SHARE),
        )
        best.prove(bound, "what cannot be cut")


def _start(workload: Workload, problem: PlacementProblem, best: Incumbent) -> list[int]:
    """Slots of the best contiguous placement that is found in a share of the time, if there is one;
    else of any placement."""
    first = Incumbent(workload, time_limit=_START_SHARE * best.time_limit, gap=best.gap)
    first.prove(best.bound, best.proved_by)
    try:
        pieced = placement_problem(workload, contiguous=True)
        require_feasible(workload, pieced)
        pieces = prove_pieces(pieced, search_pieces(pieced, first), first)
    except InfeasibleError:
        slots = any_placement(problem, best)
        best.offer(problem, slots, "packing")
        return slots
    best.offer(pieced, pieces.slot_of, first.found_by)
    slot_of = {
        operator: slot
        for members, slot in zip(pieced.members, pieces.slot_of, strict=True)
        for operator in members
    }
    return [slot_of[members[0]] for members in problem.members]
