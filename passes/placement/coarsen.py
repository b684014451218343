"""Fewer units for a search: neighbours that are dear to part and light to move become one.

In rounds, each unit is matched with the neighbour from which it is dearest to part, measured by the
work of the lighter of both: along a chain of light operators with large results it hardly matters
where a cut is, only which chains are cut. This loses placements, so that it serves to find good
ones, never to prove.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .assignment_model import solve_assignment
from .feasibility import MEMORY_TOLERANCE
from .incumbent import Incumbent
from .problem import PlacementProblem
from .reduce import Reduced, below

__all__ = ["coarsened", "search_coarse"]

_UNITS_PER_DEVICE = (8, 16)
_VARIABLES_A_SECOND = 2_000  # a larger model is built and searched in vain
_WORTH = 1e-4  # relative; smaller improvements are not asked for
_HEAVIEST = 0.25  # of the mean load: units do not grow above
_LARGEST_NET = 12  # pins; larger nets draw nobody together


def coarsened(reduced: Reduced, num_units: int) -> Reduced:
    """The problem with at most so many units, or as few as matching comes to."""
    while reduced.problem.num_units > num_units:
        pairs = _matching(reduced.problem, reduced.problem.num_units - num_units)
        if not pairs:
            break
        matched = {unit for pair in pairs for unit in pair}
        rest = ([unit] for unit in range(reduced.problem.num_units) if unit not in matched)
        reduced = reduced.merged([*map(list, pairs), *rest])
    return reduced


def _matching(problem: PlacementProblem, most: int) -> list[tuple[int, int]]:
    """Disjoint pairs of units, at most so many, the dearest to part first."""
    work = np.where(np.isfinite(problem.times), problem.times, np.nan)
    light = np.nanmin(work, axis=1)
    heaviest = _HEAVIEST * float(light.sum()) / problem.num_devices
    roomy = problem.memory.max() * (1 + MEMORY_TOLERANCE)
    least = float(light.mean()) * 1e-3 or 1.0
    draw: dict[tuple[int, int], float] = {}
    for pins, fee in zip(problem.pins, problem.fees.max(axis=1).tolist(), strict=True):
        if len(pins) <= _LARGEST_NET:
            for place, a in enumerate(pins):
                for b in pins[place + 1 :]:
                    draw[a, b] = draw.get((a, b), 0.0) + fee / (len(pins) - 1)
    rated = sorted(
        ((-value / (min(light[a], light[b]) + least), a, b) for (a, b), value in draw.items()),
    )
    taken: set[int] = set()
    pairs: list[tuple[int, int]] = []
    for _, a, b in rated:
        if len(pairs) == most:
            break
        together = np.isfinite(problem.times[a] + problem.times[b]).any()
        fits = problem.sizes[a] + problem.sizes[b] <= roomy
        small = min(light[a], light[b]) <= least or light[a] + light[b] <= heaviest
        if together and fits and small and not taken & {a, b}:
            pairs.append((a, b))
            taken |= {a, b}
    return pairs


def search_coarse(
    problem: PlacementProblem, slot_of: Sequence[int], best: Incumbent, *, share: float
) -> list[int]:
    """Ask CP-SAT for the best placement of few units, then of more; the best slots.

    Args:
        slot_of: the slots so far.
        share: of the time limit, at most; it is the same for each number of units.
    """
    slots = list(slot_of)
    for per_device in _UNITS_PER_DEVICE:
        reduced = below(problem, best.value, contiguous=False)
        if best.done or reduced is None:
            break
        few = coarsened(reduced, per_device * problem.num_devices)
        seconds = min(share / len(_UNITS_PER_DEVICE) * best.time_limit, best.left(0.5))
        variables = problem.num_devices * (few.problem.num_units + 2 * len(few.problem.pins))
        if variables > _VARIABLES_A_SECOND * seconds:
            break
        answer = solve_assignment(
            few.problem,
            best.value * (1 - _WORTH),
            precision=_WORTH,
            seconds=seconds,
            minimise=True,
        )
        if answer.slot_of is not None:
            found = few.expand(list(answer.slot_of))
            if best.offer(problem, found, "CP-SAT on merged operators"):
                slots = found
    return slots
