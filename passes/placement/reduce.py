"""What must hold of every placement below a value: kinds that drop out, units that are together.

A net whose fee does not fit beside the work of one of its pins cannot be cut, so that its pins
share a device. Large results make placement problems much smaller like this. The reduced problem
has all placements below the value that the given one has, and no others that are not placements
of the given one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import networkx as nx
import numpy as np

from .feasibility import MEMORY_TOLERANCE
from .problem import PlacementProblem, merge

__all__ = ["Reduced", "below"]


@dataclass(frozen=True)
class Reduced:
    """A smaller problem, and the unit of it for every unit of the given one."""

    problem: PlacementProblem
    label: tuple[int, ...]

    def expand(self, slot_of: list[int]) -> list[int]:
        """Slots of the given problem's units."""
        return [slot_of[unit] for unit in self.label]


def below(problem: PlacementProblem, value: float, *, contiguous: bool) -> Reduced | None:
    """The problem reduced to placements of less than a value; None: there are none.

    With `contiguous`, units on a cycle of arcs are one.
    """
    label = list(range(problem.num_units))
    while True:
        problem = _without_slow_kinds(problem, value)
        if not np.isfinite(problem.times).any(axis=1).all():
            return None
        groups = _together(problem, value, contiguous=contiguous)
        if len(groups) == problem.num_units:
            return Reduced(problem, tuple(label))
        before = problem
        problem = merge(before, groups)
        label = _relabelled(label, before, problem)


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
