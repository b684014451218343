"""Places operators so that the most loaded device has least to do: highest throughput of a stream.

The objective and the constraints are those of Tarnawski et al., "Efficient Algorithms for Device
Placement of DNN Graph Operators" (NeurIPS 2020), for any number of kinds of device.

A free search is never worse than the contiguous one of the same time limit: it makes that one's
search, whose effort is counted by work rather than by the clock, and stops that only where its
bound shows that nothing better than what is known can come of it.
"""

from __future__ import annotations

from collections.abc import Sequence

from ...compiler.ir.errors import InfeasibleError
from ...compiler.ir.workload import Workload
from .arrangements import search_arrangements
from .cover_bound import DeviceCovers
from .feasibility import require_feasible
from .incumbent import Incumbent, Progress
from .intervals import Pieces
from .problem import PlacementProblem, placement_problem
from .reduction_bound import bound_by_reduction
from .result import PlacementResult
from .throughput_contiguous import prove_pieces, search_pieces
from .throughput_free import any_placement, improve_merged, search_and_prove
from .work_bound import work_bound

__all__ = ["place_throughput"]

_CONTIGUOUS_SHARE = 0.6  # of the time limit, as work, for a contiguous search
_CLOCK_SHARE = 0.95  # of the time limit, when a contiguous search ends in any case
_ORDERS_SHARE = 0.45  # of the time limit, until which a free search tries intervals
_CONTIGUOUS_FROM = 0.55  # of the time limit, when contiguous pieces are proven at the latest


def place_throughput(
    workload: Workload,
    *,
    contiguous: bool,
    time_limit: float,
    gap: float,
    progress: Progress | None = None,
    begin: float | None = None,
) -> PlacementResult:
    """Search the placement whose largest device load is least, and prove a bound.

    Args:
        workload: operators, results that they pass on, and devices.
        contiguous: devices follow each other as stages: their graph over forward edges is acyclic.
        time_limit: seconds; kept to within the time that one step takes.
        gap: relative gap between value and bound at which the search stops.
        progress: called with the best value and bound when one of them improves.
        begin: `time.monotonic()` from which the time limit counts; None: now.

    Raises:
        InfeasibleError: no placement satisfies memory, colours and support; the cause has figures.
    """
    if contiguous:
        search = _ContiguousSearch(workload, time_limit, gap, progress, begin)
        search.find()
        search.prove()
        return search.best.result()
    best = Incumbent(workload, time_limit=time_limit, gap=gap, progress=progress, begin=begin)
    _place_freely(workload, best)
    return best.result()


class _ContiguousSearch:
    """The search for contiguous pieces, in two parts. It does the same whoever makes it.

    Raises:
        InfeasibleError: on making and on `find`: no pieces satisfy the constraints.
    """

    def __init__(
        self,
        workload: Workload,
        time_limit: float,
        gap: float,
        progress: Progress | None,
        begin: float | None,
    ) -> None:
        self.best = Incumbent(
            workload,
            time_limit=_CONTIGUOUS_SHARE * time_limit,
            gap=gap,
            progress=progress,
            clock_limit=_CLOCK_SHARE * time_limit,
            begin=begin,
        )
        self.problem = placement_problem(workload, contiguous=True)
        require_feasible(workload, self.problem)
        self.best.prove(work_bound(self.problem).value, "work alone")

    def find(self) -> Pieces:
        self.pieces = search_pieces(self.problem, self.best)
        return self.pieces

    def prove(self, *, enough: float = float("inf")) -> Pieces:
        self.pieces = prove_pieces(self.problem, self.pieces, self.best, enough=enough)
        return self.pieces


def _place_freely(workload: Workload, best: Incumbent) -> None:
    problem = placement_problem(workload, contiguous=False)
    require_feasible(workload, problem)
    best.prove(work_bound(problem).value, "work alone")
    pieced = placement_problem(workload, contiguous=True)
    try:
        first = _ContiguousSearch(workload, best.time_limit, best.gap, None, best.begin)
        slots = _slots(pieced, first.find().slot_of, problem)
        best.offer(problem, slots, first.best.found_by)
    except InfeasibleError:
        first = None
        slots = any_placement(problem, best)
        best.offer(problem, slots, "packing")
    bound_by_reduction(problem, best, contiguous=False)
    slots = search_arrangements(problem, pieced, slots, best, share=_ORDERS_SHARE)
    covers = DeviceCovers(problem, pieced)
    slots = improve_merged(problem, covers, slots, best, until=_CONTIGUOUS_FROM)
    if first is not None and best.bound < best.value:
        pieces = first.prove(enough=best.value)
        if best.offer(pieced, pieces.slot_of, first.best.found_by):
            slots = _slots(pieced, pieces.slot_of, problem)
    search_and_prove(problem, covers, slots, best)


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
