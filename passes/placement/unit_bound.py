"""A bound from single units: what any device that holds one has to do at least.

The least load of a device that holds unit v, whatever else it holds, is a minimum cut: units that
join v cost their work, and nets of which some pins join and others do not cost their fee. In the
network, v is the source; every unit has an arc of its work to the sink; a net is an arc of its fee
that every pin leads to and that leads to every pin.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .problem import PlacementProblem

__all__ = ["least_load", "unit_bound"]

_MOST_UNITS = 40  # that are looked at, the heaviest
_MOST_CUTS = 40_000  # units that are looked at x units of the problem; about two seconds
_SCALE = 10**9  # whole units that the value asked about has; capacities are rounded down


def unit_bound(
    problem: PlacementProblem, enough: float, *, seconds_left: Callable[[], float]
) -> float:
    """The largest of the units' least loads, as far as they are looked at.

    Args:
        enough: bounds above it are of no more use; the search ends there.
        seconds_left: it ends when this is 0, too.
    """
    alone = problem.times.copy()
    for net, pins in enumerate(problem.pins):
        alone[list(pins)] += problem.fees[net]
    alone = alone.min(axis=1)  # a unit is never worse off than by itself
    bound = 0.0
    number = min(_MOST_UNITS, 1 + _MOST_CUTS // problem.num_units)
    heaviest = np.argsort(-problem.times.min(axis=1), kind="stable")[:number]
    for unit in heaviest.tolist():
        if bound >= enough or seconds_left() <= 0:
            break
        if alone[unit] > bound:
            kinds = np.flatnonzero(np.isfinite(problem.times[unit])).tolist()
            least = min(least_load(problem, unit, kind, enough)[0] for kind in kinds)
            bound = max(bound, least)
    return bound


def least_load(
    problem: PlacementProblem, unit: int, kind: int, enough: float
) -> tuple[float, list[int]]:
    """Least load of a device of a kind that holds a unit, rounded down, and the units it holds.

    Args:
        enough: larger figures need not be told apart.
    """
    from ortools.graph.python import max_flow

    scale = _SCALE / enough
    times = problem.times[:, kind]
    fees = np.floor(np.minimum(problem.fees[:, kind], 2 * enough) * scale).astype(np.int64)
    cost = np.floor(np.minimum(times, 2 * enough) * scale).astype(np.int64)
    sink = problem.num_units
    flow = max_flow.SimpleMaxFlow()
    for other, capacity in enumerate(cost.tolist()):
        if other != unit and capacity:
            flow.add_arc_with_capacity(other, sink, capacity)
    free = sink + 1
    for pins, fee in zip(problem.pins, fees.tolist(), strict=True):
        if not fee:
            continue
        if len(pins) == 2:
            flow.add_arc_with_capacity(*pins, fee)
            flow.add_arc_with_capacity(*reversed(pins), fee)
            continue
        flow.add_arc_with_capacity(free, free + 1, fee)
        for pin in pins:
            flow.add_arc_with_capacity(pin, free, fee)
            flow.add_arc_with_capacity(free + 1, pin, fee)
        free += 2
    assert flow.solve(unit, sink) == flow.OPTIMAL
    held = sorted(node for node in flow.get_source_side_min_cut() if node < sink)
    return float(times[unit]) + flow.optimal_flow() / scale, held or [unit]
