"""Places operators so that the most loaded device has least to do: highest throughput of a stream.

The objective and the constraints are those of Tarnawski et al., "Efficient Algorithms for Device
Placement of DNN Graph Operators" (NeurIPS 2020), for any number of kinds of device.
"""

from __future__ import annotations

from ...compiler.ir.workload import Workload
from .feasibility import require_feasible
from .incumbent import Incumbent, Progress
from .problem import placement_problem
from .result import PlacementResult
from .throughput_contiguous import prove_pieces, search_pieces
from .work_bound import work_bound

__all__ = ["place_throughput"]


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
    pieces = search_pieces(problem, best)
    prove_pieces(problem, pieces, best)
    return best.result()
