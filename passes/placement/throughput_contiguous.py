"""Contiguous placement for throughput: good pieces of many orders, then proof by CP-SAT.

Pieces come from dynamic programming over intervals of topological orders (`orders`, `intervals`);
then CP-SAT is asked for pieces whose largest load is less by the gap that is allowed. Where there
are none, that is the proof; else the answer is the next value to beat (`stage_model`).
"""

from __future__ import annotations

from .anneal import anneal_pieces
from .feasibility import no_packing
from .incumbent import Incumbent
from .intervals import Pieces, best_pieces
from .orders import topological_orders
from .problem import PlacementProblem
from .reduce import below
from .stage_model import solve_stages

__all__ = ["SMALLEST_STEP", "prove_pieces", "search_pieces"]

SMALLEST_STEP = 1e-6  # relative; proofs do not try to tell closer values apart
_MOST_ORDERS = 40
_MOST_VARIABLES = 60_000
_ORDERS_SHARE, _ANNEAL_SHARE = 0.25, 0.4  # of the time limit, at most


def search_pieces(problem: PlacementProblem, best: Incumbent) -> Pieces:
    """Good pieces without proof; all improvements are offered.

    Raises:
        InfeasibleError: no pieces fit into the devices' memory.
    """
    pieces = None
    value = float("inf")
    for number, order in enumerate(topological_orders(problem, count=_MOST_ORDERS)):
        found = best_pieces(problem, order, seed=number)
        if found is not None and best.offer(problem, found.slot_of, "interval programming"):
            pieces, value = found, best.value
        if best.done or best.left(_ORDERS_SHARE) <= 0:
            break
    if pieces is None:
        pieces = _any_pieces(problem, best)
        best.offer(problem, pieces.slot_of, "CP-SAT")
    if not best.done and not _small(problem):
        better, value = anneal_pieces(
            problem,
            pieces,
            seconds=_ANNEAL_SHARE * best.time_limit,
            at_most=best.left(_ORDERS_SHARE + _ANNEAL_SHARE),
        )
        if best.offer(problem, better.slot_of, "annealing"):
            pieces = better
    return pieces


def prove_pieces(problem: PlacementProblem, pieces: Pieces, best: Incumbent) -> Pieces:
    """Close the gap as far as time allows; the best pieces at the end."""
    if not _small(problem):
        return pieces
    aim = step = max(0.9 * best.gap, SMALLEST_STEP)
    while not best.done and best.left() > 0.05 and aim < 0.5:
        limit = best.value * (1 - aim)
        if limit <= best.bound:
            aim = aim / 2
            continue
        answer = _pieces_below(problem, limit, step, best.left() * 0.8)
        if answer is None:
            best.prove(limit, "CP-SAT over stages")
            if aim <= step:
                break
            aim = max(step, aim / 2)
        elif isinstance(answer, Pieces):
            if not best.offer(problem, answer.slot_of, "CP-SAT over stages"):
                break
            pieces, aim = answer, step
        else:
            # no answer in time: a weaker bound is easier to prove
            aim *= 3
    return pieces


def _small(problem: PlacementProblem) -> bool:
    pins = sum(map(len, problem.pins))
    per_stage = len(problem.counts) * (problem.num_units + len(problem.pins)) + pins
    return problem.num_devices * per_stage <= _MOST_VARIABLES


def _pieces_below(
    problem: PlacementProblem, limit: float, step: float, seconds: float
) -> Pieces | None | bool:
    """Pieces with loads up to the limit; None: there are none; False: no answer in time."""
    reduced = below(problem, limit * (1 + 1e-9), contiguous=True)
    if reduced is None:
        return None
    answer = solve_stages(reduced.problem, limit, precision=step / 20, seconds=seconds)
    if answer.infeasible:
        return None
    if answer.pieces is None:
        return False
    return Pieces(tuple(reduced.expand(list(answer.pieces.slot_of))), answer.pieces.sequence)


def _any_pieces(problem: PlacementProblem, best: Incumbent) -> Pieces:
    """Pieces of any load, where no order's intervals fit into memory."""
    finite = problem.times[problem.times < float("inf")]
    highest = float(finite.sum() + problem.fees.sum() + 1)
    answer = solve_stages(problem, highest, precision=0.01, seconds=best.left(0.5))
    if answer.pieces is None:
        raise no_packing(best.workload, problem, proven=answer.infeasible)
    return answer.pieces
