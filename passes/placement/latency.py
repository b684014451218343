"""Placement of operators for latency: where each runs so that one sample is through soonest.

With `contiguous` a machine (a device that is not concurrent) runs one piece; without, any number of
pieces one after another (`cost_models.placement.latency` and `piece_latency` are the objectives).
Dynamic programs over topological orders and list schedules give first placements; CP-SAT then looks
for better ones. On single operators it also proves a bound; where they are too many it works on
groups of them, for better placements only, and the bound is that of paths and work.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

from ...compiler.ir.errors import InfeasibleError
from ...compiler.ir.workload import Workload
from .feasibility import require_feasible
from .filling import filled
from .incumbent import Progress
from .latency_bounds import latency_bound
from .latency_contiguous import build_contiguous
from .latency_incumbent import LatencyIncumbent, LatencyResult
from .latency_intervals import interval_groups, latency_units, order_pieces
from .latency_lists import ListScheduler, earliest_finish, single_pieces, whole_pieces
from .latency_moves import improve_by_moves
from .latency_problem import LatencyProblem, latency_problem
from .latency_schedule import build_schedule
from .latency_ticks import Effort, Found, Ticks, solve
from .orders import topological_orders
from .problem import PlacementProblem, placement_problem

__all__ = ["place_latency"]

_MOST_VARIABLES = 60_000  # of a program on single operators
_MOST_INTERVALS = 6_000  # of a schedule on single operators
_GROUPS = (24, 60, 150)  # units of coarse problems
_ORDERS, _FEW = 40, 5  # topological orders
_MANY_PLACES = 1000  # units x machines beyond which moves find more than CP-SAT for some time
_MOVES_SHARE, _MOVES_SHARE_OF_LARGE = 0.25, 0.5  # of the time, until which operators are moved
_FEW_PLACES = 200  # units x machines up to which one thread is enough, and repeats itself
_WORKERS = 4  # strategies of CP-SAT that race; more of them only share two cores
_WORTH_BUILDING = 4.0  # times what building the last program took must be left for the next
_SEARCH = 0.95  # of the time, so that ends of programs and evaluations stay within it
_SEED = 0


def place_latency(
    workload: Workload,
    *,
    contiguous: bool,
    time_limit: float,
    gap: float,
    progress: Progress | None = None,
    begin: float | None = None,
) -> LatencyResult:
    """Search the placement with the least latency, and prove a bound.

    Args:
        workload: operators, results that they pass on, and devices, those of a concurrent kind
            counted as one.
        contiguous: a machine runs one piece.
        time_limit: seconds; kept to within the time that one step takes.
        gap: relative gap between value and bound at which the search stops.
        progress: called with the best value and bound when one of them improves.
        begin: `time.monotonic()` from which the time limit counts; None: now.

    Raises:
        InfeasibleError: no placement satisfies memory, colours, support and contiguity.
    """
    best = LatencyIncumbent(
        workload,
        contiguous=contiguous,
        time_limit=time_limit,
        gap=gap,
        progress=progress,
        begin=begin,
    )
    require_feasible(workload, placement_problem(workload, contiguous=False))
    problem = latency_problem(workload)
    best.prove(latency_bound(problem), "paths and work")
    units = latency_units(workload)
    _first_placements(problem, units, best)
    if not best.done:
        _search(problem, units, best)
    if best.placement is None:
        raise _nothing_found(best)
    return best.result()


def _first_placements(
    problem: LatencyProblem, units: PlacementProblem, best: LatencyIncumbent
) -> None:
    """Offer what heuristics find in part of the time, and one placement whatever it takes."""
    if not best.contiguous:
        device_of = earliest_finish(problem)
        if device_of is not None:
            _offer_free(problem, device_of, None, best, "earliest finish first")
    hosts = _slots(units, problem.hosts)
    slots = [*_slots(units, problem.machines), *hosts]
    for order in topological_orders(units, count=_ORDERS):
        slot_of = filled(units, order, slots, math.inf, num_hosts=len(hosts))
        if slot_of is not None:
            _offer(problem, units.placement(slot_of), None, best, "filling along an order")
        for placement in order_pieces(best.workload, units, order):
            _offer(problem, placement, None, best, "intervals of an order")
        if best.done or (best.placement is not None and not best.left(0.05)):
            break
    if best.contiguous and not best.done:
        _move_groups(units, best)
    if best.placement is not None and not best.done:
        _move_operators(problem, units, best)


def _slots(units: PlacementProblem, devices: Sequence[int]) -> list[int]:
    """The slots of devices."""
    numbers = [device for group in units.devices for device in group]
    return [slot for slot, device in enumerate(numbers) if device in set(devices)]


def _move_groups(units: PlacementProblem, best: LatencyIncumbent) -> None:
    """Local search on groups of operators, coarse and finer, along several orders."""
    tries = [(order, count) for count in _GROUPS for order in topological_orders(units, count=_FEW)]
    for number, (order, count) in enumerate(tries):
        seconds = best.left(0.15) / (len(tries) - number)
        start = interval_groups(best.workload, units, order, count)
        if start is None or seconds <= 0:
            continue
        groups, device_of = start
        coarse = latency_problem(best.workload, groups)
        improve_by_moves(
            coarse,
            [(unit,) for unit in range(coarse.num_units)],
            device_of,
            contiguous=True,
            seconds=seconds,
            seed=_SEED,
            found=partial(
                _offer, coarse, order=None, best=best, method=f"local search on {count} groups"
            ),
        )


def _move_operators(
    problem: LatencyProblem, units: PlacementProblem, best: LatencyIncumbent
) -> None:
    """Local search on operators, of which only colours stay together where pieces are free."""
    assert best.placement is not None
    large = problem.num_units * len(problem.machines) > _MANY_PLACES
    improve_by_moves(
        problem,
        units.members if best.contiguous else problem.workload.colours,
        best.placement,
        contiguous=best.contiguous,
        seconds=best.left(_MOVES_SHARE_OF_LARGE if large else _MOVES_SHARE),
        seed=_SEED,
        found=partial(_offer, problem, order=None, best=best, method="local search"),
    )


def _offer(
    problem: LatencyProblem,
    device_of: Sequence[int],
    order: Sequence[int] | None,
    best: LatencyIncumbent,
    method: str,
) -> None:
    """Offer a placement of units in the form that the search is for."""
    if best.contiguous:
        best.offer(problem.expand(device_of), None, method)
    else:
        _offer_free(problem, device_of, order, best, method)


def _offer_free(
    problem: LatencyProblem,
    device_of: Sequence[int],
    order: Sequence[int] | None,
    best: LatencyIncumbent,
    method: str,
) -> None:
    """Offer a placement with whole pieces, with single ones in the given order, and in that of a
    list schedule."""
    placement = problem.expand(device_of)
    whole = whole_pieces(problem, device_of)
    if whole is not None:
        best.offer(placement, whole, method)
    for one in (order, ListScheduler(problem).order(device_of)):
        if one is not None:
            best.offer(placement, single_pieces(problem, device_of, one), method)


def _search(problem: LatencyProblem, units: PlacementProblem, best: LatencyIncumbent) -> None:
    slots = min(len(problem.machines), problem.num_units)
    variables = (problem.num_units + len(problem.nets)) * (2 * slots + 1)
    small = variables <= _MOST_VARIABLES
    if best.contiguous and small:
        _solve(problem, best, best.left(_SEARCH), pieces=True)
        return
    if not best.contiguous and problem.num_units * len(problem.machines) <= _MOST_INTERVALS:
        # one piece a machine is a good start, and quickly found
        _solve(problem, best, best.left(_SEARCH) / 7, pieces=True)
        if not best.done:
            _solve(problem, best, best.left(_SEARCH), pieces=False)
        return
    if small:
        _solve(problem, best, best.left(_SEARCH), pieces=True)
        return
    built = 0.0
    for number, count in enumerate(_GROUPS):
        if best.left(_SEARCH) < _WORTH_BUILDING * built:
            break
        for order in topological_orders(units, count=1):
            found = interval_groups(best.workload, units, order, count)
            if found is not None:
                coarse = latency_problem(best.workload, found[0])
                share = best.left(_SEARCH) / (len(_GROUPS) - number)
                built = _solve(coarse, best, share, pieces=True)


def _solve(
    problem: LatencyProblem, best: LatencyIncumbent, seconds: float, *, pieces: bool
) -> float:
    """Ask CP-SAT for better placements: with one piece a machine, or any number of pieces.

    What it proves counts where the units are single operators and the pieces those of the search.
    Returns the seconds that building the program took.
    """
    if seconds <= 0:
        return 0.0
    single = all(len(members) == 1 for members in problem.members)
    proves = single and pieces == best.contiguous
    ticks = Ticks.of(problem, best.value if single else float("inf"))
    hint = _hint(problem, best, pieces)
    begin = best.seconds
    build = build_contiguous if pieces else build_schedule
    program = build(problem, ticks, hint)
    built = best.seconds - begin
    name = "one piece a machine" if pieces else "a schedule"
    name = f"CP-SAT for {name}" + ("" if single else f" of {problem.num_units} groups")

    def on_solution(found: Found) -> None:
        _offer(problem, found.device_of, found.order, best, name)

    def on_bound(bound: float) -> None:
        if proves:
            best.prove(bound, name)

    # leaving takes about as long as building
    seconds = min(best.left(_SEARCH) - built, seconds)
    if seconds <= 0:
        return built
    small = problem.num_units * len(problem.machines) <= _FEW_PLACES
    effort = Effort(seconds, best.gap, workers=1 if small else _WORKERS, seed=_SEED)
    infeasible = solve(program, effort, on_solution, on_bound)
    if infeasible and proves:
        assert best.placement is None, "the program excludes a placement that exists"
        raise _nothing_found(best, proven=True)
    return built


def _hint(problem: LatencyProblem, best: LatencyIncumbent, pieces: bool) -> list[int] | None:
    """The best placement as devices of units, if it is one of the problem."""
    if best.placement is None:
        return None
    device_of = []
    for members in problem.members:
        devices = {best.placement[v] for v in members}
        if len(devices) > 1:
            return None
        device_of.append(devices.pop())
    if pieces and whole_pieces(problem, device_of) is None:
        return None
    return device_of


def _nothing_found(best: LatencyIncumbent, *, proven: bool = False) -> InfeasibleError:
    workload = best.workload
    held = sum(operator.size for operator in workload.operators)
    memory = [workload.kinds[k].memory for k in workload.kind_of]
    limit = sum(m for m in memory if m is not None)
    pieces = " with one contiguous piece a device" if best.contiguous else ""
    state = "there is no" if proven else f"the search found in {best.seconds:.0f} s no"
    return InfeasibleError(
        f"{state} placement{pieces}: operators hold {held:.0f} bytes, devices with a limit"
        f" {limit:.0f} bytes together",
        where="devices",
        ways_out=(
            "more devices, or devices with more memory",
            "fewer operators of one colour",
            *(("several pieces a device: --non-contiguous",) if best.contiguous else ()),
            *(() if proven else ("a longer time limit",)),
        ),
    )
