"""What must hold of every placement below a value: kinds that drop out, units that are together.

A net whose fee does not fit beside the work of one of its pins cannot be cut, so that its pins
share a device. Large results make placement problems much smaller like this. Where pieces must be
contiguous, a net whose pins have too much work between them is cut in any case: both pins have its
fee to bear, which leaves less room for others. The reduced problem has all placements below the
value that the given one has, and no others that are not placements of the given one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import networkx as nx
import numpy as np

from .feasibility import MEMORY_TOLERANCE
from .problem import PlacementProblem, merge
from .windows import reaches

__all__ = ["MOST_TO_REDUCE", "Reduced", "below"]

MOST_TO_REDUCE = 5000  # units; larger problems are not reduced again and again
_MOST_FOR_PATHS = 2000  # units; paths need the transitive closure


@dataclass(frozen=True)
class Reduced:
    """A smaller problem, and the unit of it for every unit of the given one."""

    problem: PlacementProblem
    label: tuple[int, ...]

    def expand(self, slot_of: list[int]) -> list[int]:
        """Slots of the given problem's units."""
        return [slot_of[unit] for unit in self.label]

    def merged(self, groups: list[list[int]]) -> Reduced:
        """The same with groups of units merged, which cover all units once."""
        problem = merge(self.problem, groups)
        label = _relabelled(list(self.label), self.problem, problem)
        return Reduced(problem, tuple(label))


def below(problem: PlacementProblem, value: float, *, contiguous: bool) -> Reduced | None:
    """The problem reduced to placements of less than a value; None: there are none.

    With `contiguous`, units on a cycle of arcs are one.
    """
    label = list(range(problem.num_units))
    while True:
        if contiguous and problem.num_units <= _MOST_FOR_PATHS:
            problem = _with_sure_cuts(problem, value)
        problem = _without_slow_kinds(problem, value)
        if not np.isfinite(problem.times).any(axis=1).all():
            return None
        groups = _together(problem, value, contiguous=contiguous)
        if len(groups) == problem.num_units:
            return Reduced(problem, tuple(label))
        before = problem
        problem = merge(before, groups)
        label = _relabelled(label, before, problem)


def _with_sure_cuts(problem: PlacementProblem, value: float) -> PlacementProblem:
    """Nets of two pins that cannot be on one device become work of both.

    On a device with both are all units on paths between them; it must support and bear those.
    """
    pairs = [net for net, pins in enumerate(problem.pins) if len(pins) == 2]
    if not pairs:
        return problem
    reach = reaches(problem)
    first, second = np.array([problem.pins[net] for net in pairs]).T
    between = (reach[first] | reach[second]) & (reach[:, first] | reach[:, second]).T
    between[np.arange(len(pairs)), first] = between[np.arange(len(pairs)), second] = True
    supported = np.isfinite(problem.times)
    work = between @ np.where(supported, problem.times, 0.0)
    possible = (work < value) & ((between @ ~supported) == 0)
    possible &= between @ problem.sizes[:, None] <= problem.memory * (1 + MEMORY_TOLERANCE)
    sure = {net for net, row in zip(pairs, possible, strict=True) if not row.any()}
    if not sure:
        return problem
    times = problem.times.copy()
    for net in sure:
        times[list(problem.pins[net])] += problem.fees[net]
    kept = [net for net in range(len(problem.pins)) if net not in sure]
    return replace(
        problem,
        times=times,
        pins=tuple(problem.pins[net] for net in kept),
        fees=problem.fees[kept],
    )


def _without_slow_kinds(problem: PlacementProblem, value: float) -> PlacementProblem:
    """Kinds on which a unit alone takes too long, or does not fit, do not support it."""
    fits = problem.sizes[:, None] <= (problem.memory * (1 + MEMORY_TOLERANCE))[None, :]
    possible = (problem.times < value) & fits
    return replace(problem, times=np.where(possible, problem.times, np.inf))


def _together(problem: PlacementProblem, value: float, *, contiguous: bool) -> list[list[int]]:
    """Groups of units that share a device in every placement below the value."""
    same = nx.utils.UnionFind(range(problem.num_units))
    for pins, fee in zip(problem.pins, problem.fees, strict=True):
        # kinds on which a pin can bear the fee of a net that is cut
        bear = [frozenset(np.flatnonzero(problem.times[unit] + fee < value)) for unit in pins]
        if not all(bear) or sum(problem.counts[k] for k in frozenset().union(*bear)) < 2:
            same.union(*pins)
            continue
        single = [
            (kinds, unit)
            for kinds, unit in zip(bear, pins, strict=True)
            if sum(problem.counts[k] for k in kinds) == 1
        ]
        for kinds, unit in single:
            same.union(next(first for other, first in single if other == kinds), unit)
    groups = [sorted(group) for group in same.to_sets()]
    if not contiguous:
        return groups
    of = {unit: number for number, group in enumerate(groups) for unit in group}
    graph = nx.DiGraph((of[u], of[v]) for u, v in problem.arcs if of[u] != of[v])
    graph.add_nodes_from(range(len(groups)))
    return [
        sorted(unit for number in cycle for unit in groups[number])
        for cycle in nx.strongly_connected_components(graph)
    ]


def _relabelled(label: list[int], before: PlacementProblem, after: PlacementProblem) -> list[int]:
    where = {operator: unit for unit, members in enumerate(after.members) for operator in members}
    return [where[before.members[unit][0]] for unit in label]
