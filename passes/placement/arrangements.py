"""Free placements from intervals of orders that need not be topological.

The best contiguous placement often has one device that can do no better: a heavy unit and what it
costs to cut it off. Free of contiguity, that device may hold the unit's *core*, the units with
which it has the least load (`unit_bound`), wherever they are in the graph. Cores are merged, and
the best intervals taken of topological orders in which each core stands where its heaviest unit is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from .incumbent import Incumbent
from .intervals import best_pieces
from .orders import topological_orders
from .problem import Floats, PlacementProblem
from .reduce import Reduced, below
from .unit_bound import least_load

__all__ = ["search_arrangements"]

_LEVELS = (1.0, 0.5)  # between bound and value: what is reduced below which
_MOST_ORDERS = 3
_MOST_CORES = 3


def search_arrangements(
    problem: PlacementProblem,
    pieced: PlacementProblem,
    slot_of: Sequence[int],
    best: Incumbent,
    *,
    share: float,
) -> list[int]:
    """Offer intervals of orders until a share of the time is over; the best slots.

    Args:
        pieced: the contiguous problem of the same workload, which orders are made of.
        slot_of: the slots so far.
    """
    slots = list(slot_of)
    low, high = best.bound, best.value
    orders = topological_orders(pieced, count=_MOST_ORDERS)
    places = [_places(pieced, order) for order in orders]
    for level in _LEVELS:
        reduced = below(problem, low + level * (high - low), contiguous=False)
        if reduced is None:
            continue
        for grouped in _with_cores(reduced, best.value):
            for place in places:
                if best.done or best.left(share) <= 0:
                    return slots
                pieces = best_pieces(grouped.problem, _order(problem, grouped, place))
                if pieces is None:
                    continue
                found = grouped.expand(list(pieces.slot_of))
                if best.offer(problem, found, "intervals with cores"):
                    slots = found
    return slots


def _places(pieced: PlacementProblem, order: Sequence[int]) -> Floats:
    """Place in an order of units of every operator."""
    place = np.zeros(sum(map(len, pieced.members)))
    for number, unit in enumerate(order):
        place[list(pieced.members[unit])] = number
    return place


def _order(problem: PlacementProblem, grouped: Reduced, place: Floats) -> list[int]:
    """Merged units by the place of the heaviest of their units."""
    work = problem.times.min(axis=1)
    heaviest = [0] * grouped.problem.num_units
    for unit in np.argsort(work, kind="stable").tolist():
        heaviest[grouped.label[unit]] = unit
    at = [place[problem.members[unit][0]] for unit in heaviest]
    return sorted(range(len(at)), key=lambda merged: (at[merged], merged))


def _with_cores(reduced: Reduced, value: float) -> Iterator[Reduced]:
    """The problem with one, two, ... cores of the heaviest units merged, and with none."""
    taken: set[int] = set()
    groups: list[list[int]] = []
    problem = reduced.problem
    for unit in np.argsort(-problem.times.min(axis=1), kind="stable").tolist()[: 2 * _MOST_CORES]:
        if unit in taken or len(groups) == _MOST_CORES:
            continue
        kind = int(np.argmin(problem.times[unit]))
        load, core = least_load(problem, unit, kind, value)
        if len(core) == 1 or load >= value or taken & set(core):
            continue
        taken |= set(core)
        groups.append(core)
        rest = [[other] for other in range(problem.num_units) if other not in taken]
        yield reduced.merged([*groups, *rest])
    yield reduced
