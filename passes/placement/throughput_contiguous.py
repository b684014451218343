"""Contiguous placement for throughput: good pieces of many orders, then proof by CP-SAT.

Pieces come from dynamic programming over intervals of topological orders (`orders`, `intervals`),
and are annealed; a bound without search (`reduction_bound`) often ends that. Then CP-SAT is asked
for pieces whose largest load is less by the gap that is allowed. Where there are none, that is the
proof; else the answer is the next value to beat (`stage_model`).
"""

from __future__ import annotations

import math

from .anneal import anneal_pieces, annealing_seconds
from .descent import SMALLEST_STEP, Answer, descend
from .feasibility import no_packing
from .incumbent import Incumbent
from .intervals import Pieces, best_pieces, pieces_seconds
from .orders import topological_orders
from .problem import PlacementProblem
from .reduce import MOST_TO_REDUCE, below
from .reduction_bound import bound_by_reduction
from .stage_model import solve_stages

__all__ = ["prove_pieces", "search_pieces"]

_METHOD = "CP-SAT over stages"
_MOST_ORDERS = 40
_MOST_VARIABLES, _VARIABLES_A_SECOND = 60_000, 50_000  # building them takes time, too
_UNITS_A_SECOND = 1e4  # that are reduced
_ORDERS_SHARE = 0.25  # of the time limit, at most
_ANNEAL_SHARE, _ANNEAL_SHARE_OF_SMALL = 0.4, 0.05  # of the time limit


def search_pieces(problem: PlacementProblem, best: Incumbent) -> Pieces:
    """Good pieces, and the bound without search; all improvements are offered.

    Raises:
        InfeasibleError: no pieces fit into the devices' memory.
    """
    pieces = None
    each = pieces_seconds(problem)
    for number, order in enumerate(topological_orders(problem, count=_MOST_ORDERS)):
        found = best_pieces(problem, order, seed=number)
        best.spend(each)
        if found is not None and best.offer(problem, found.slot_of, "interval programming"):
            if pieces is None:
                bound_by_reduction(problem, best, contiguous=True)
            pieces = found
        if best.done or best.left(_ORDERS_SHARE) <= 0:
            break
    if pieces is None:
        pieces = _any_pieces(problem, best)
        best.offer(problem, pieces.slot_of, "CP-SAT")
        bound_by_reduction(problem, best, contiguous=True)
    if not best.done:
        share = _ANNEAL_SHARE_OF_SMALL if _small(problem) else _ANNEAL_SHARE
        seconds = annealing_seconds(problem, share * best.time_limit)
        better, _ = anneal_pieces(problem, pieces, seconds=seconds, at_most=best.clock_left)
        best.spend(seconds)
        if best.offer(problem, better.slot_of, "annealing"):
            pieces = better
    return pieces


def prove_pieces(
    problem: PlacementProblem, pieces: Pieces, best: Incumbent, *, enough: float = math.inf
) -> Pieces:
    """Close the gap as far as time allows; the best pieces at the end.

    Args:
        enough: a bound at which to stop, too.
    """
    if problem.num_units > MOST_TO_REDUCE:
        return pieces
    kept = pieces

    def take(found: Pieces) -> bool:
        nonlocal kept
        better = best.offer(problem, found.slot_of, _METHOD)
        kept = found if better else kept
        return better

    descend(
        best,
        lambda limit, seconds: _pieces_below(problem, limit, best, seconds),
        take,
        method=_METHOD,
        first_aim=0.0,
        share=1.0,
        share_each=0.8,
        enough=enough,
    )
    return kept


def _small(problem: PlacementProblem, seconds: float = math.inf) -> bool:
    """Whether the model of a problem is worth building in so many seconds."""
    return _variables(problem) <= min(_MOST_VARIABLES, _VARIABLES_A_SECOND * seconds)


def _variables(problem: PlacementProblem) -> int:
    pins = sum(map(len, problem.pins))
    per_stage = len(problem.counts) * (problem.num_units + len(problem.pins)) + pins
    return problem.num_devices * per_stage


def _pieces_below(
    problem: PlacementProblem, limit: float, best: Incumbent, seconds: float
) -> Answer[Pieces]:
    best.spend(problem.num_units / _UNITS_A_SECOND)
    reduced = below(problem, limit * (1 + 1e-9), contiguous=True)
    if reduced is None:
        return Answer(None, none_exists=True)
    if not _small(reduced.problem, seconds):
        return Answer(None, none_exists=False)
    answer = solve_stages(
        reduced.problem,
        limit,
        precision=max(best.gap, SMALLEST_STEP) / 20,
        seconds=seconds,
        at_most=best.clock_left,
    )
    best.spend(answer.spent + _variables(reduced.problem) / _VARIABLES_A_SECOND)
    if answer.pieces is None:
        return Answer(None, none_exists=answer.infeasible)
    slots = reduced.expand(list(answer.pieces.slot_of))
    return Answer(Pieces(tuple(slots), answer.pieces.sequence), none_exists=False)


def _any_pieces(problem: PlacementProblem, best: Incumbent) -> Pieces:
    """Pieces of any load, where no order's intervals fit into memory."""
    if not _small(problem):
        raise no_packing(best.workload, problem, contiguous=True, proven=False)
    finite = problem.times[problem.times < float("inf")]
    highest = float(finite.sum() + problem.fees.sum() + 1)
    answer = solve_stages(
        problem, highest, precision=0.01, seconds=best.left(0.5), at_most=best.clock_left
    )
    best.spend(answer.spent)
    if answer.pieces is None:
        raise no_packing(best.workload, problem, contiguous=True, proven=answer.infeasible)
    return answer.pieces
