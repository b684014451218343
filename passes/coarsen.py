"""Units: groups of nodes that the stage partition never separates.

From a graph, the nodes to group and their seconds to a tuple of units in topological order. Three
steps, each of which keeps the graph of units acyclic, so that every monotone assignment of units
is a legal partition:

1. Nodes that touch one buffer which the step changes are one unit, with all nodes on paths between
   them (the strongly connected components of the contracted graph). Nodes that exchange no value
   with others join the node before them.
2. A cheap unit joins its only predecessor or its only successor, over the heavier edge first:
   views, casts, activations and norms are cut where least would be sent.
3. If more units remain than wanted, program order is cut into intervals at positions where fewer
   bytes cross than anywhere within a window of w units; w is the least that leaves few enough.
   Transformers are cut at the residual stream, between attention and MLP. The heaviest intervals
   are then split, each where least crosses near its middle, as long as units are left.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import networkx as nx

from ..compiler.ir.graph import Graph, OutputKind, ValueKind, producers, users

__all__ = ["Coarsening", "coarsen"]

_CHEAP = 1 / 64  # of a stage's even share of the work
_LARGEST = 1 / 8  # of the same: cheap units do not grow further by joining each other
_NEGLIGIBLE = 1.1  # a unit may grow by a tenth at a time beyond that
_FINE = 1 / 16  # of a stage's share: lighter intervals are not split further
_MIDDLE = 0.25  # the lighter part of a split interval has at least this share of it


@dataclass(frozen=True, slots=True)
class Coarsening:
    """What to coarsen for.

    Args:
        seconds: cost by node id (forward and backward).
        num_stages: the most stages that are wanted, which sets how fine units must be.
        max_units: no more units than this, unless the labels need more.
        labels: node id -> label; nodes of different labels (pins) are never in one unit.
        together: groups of nodes that must be in one unit, with all nodes on paths between them.
    """

    seconds: Sequence[float]
    num_stages: int
    max_units: int
    labels: Mapping[int, Hashable]
    together: Sequence[Sequence[int]] = ()


def coarsen(graph: Graph, nodes: Iterable[int], how: Coarsening) -> tuple[tuple[int, ...], ...]:
    """Units of `nodes`: node ids ascending, units in topological order."""
    chosen = sorted(nodes)
    groups = _Groups(graph, chosen, how)
    kept = set(chosen)
    together = [sorted(kept.intersection(group)) for group in how.together]
    groups.join_cycles([*_buffer_groups(graph, kept), *together])
    groups.join_isolated()
    groups.fuse_cheap()
    units = groups.units()
    if len(units) > how.max_units:
        units = _cut_program_order(graph, units, how)
    return units


def _buffer_groups(graph: Graph, chosen: set[int]) -> list[list[int]]:
    """For each buffer that the step changes, the nodes that read it or compute its new content."""
    made_by, read_by = producers(graph), users(graph)
    origins = {
        name: value.id
        for value in graph.values_of(ValueKind.BUFFER)
        for name in (value.origin, *value.aliases)
    }
    groups: dict[int, set[int]] = defaultdict(set)
    for output in graph.outputs_of(OutputKind.BUFFER):
        buffer = origins.get(output.target, output.value)
        groups[buffer].update(read_by[buffer])
        if output.value in made_by:
            groups[buffer].add(made_by[output.value])
    return [sorted(group & chosen) for _, group in sorted(groups.items())]


class _Groups:
    """Units while they are merged, as a graph between representatives."""

    def __init__(self, graph: Graph, nodes: list[int], how: Coarsening) -> None:
        self.how = how
        self.members = {node: [node] for node in nodes}
        self.seconds = {node: how.seconds[node] for node in nodes}
        self.label = {node: how.labels.get(node) for node in nodes}
        self.after: dict[int, dict[int, int]] = {node: {} for node in nodes}
        self.before: dict[int, dict[int, int]] = {node: {} for node in nodes}
        made_by = producers(graph)
        for node in nodes:
            for value in dict.fromkeys(graph.nodes[node].inputs):
                source = made_by.get(value)
                if source in self.members:
                    self._connect(source, node, graph.values[value].type.num_bytes)

    def _connect(self, source: int, target: int, num_bytes: int) -> None:
        total = self.after[source].get(target, 0) + num_bytes
        self.after[source][target] = self.before[target][source] = total

    def join(self, kept: int, gone: int) -> None:
        """Merge unit `gone` into `kept`."""
        self.members[kept] += self.members.pop(gone)
        self.seconds[kept] += self.seconds.pop(gone)
        self.label.pop(gone)
        for target, num_bytes in self.after.pop(gone).items():
            del self.before[target][gone]
            if target != kept:
                self._connect(kept, target, num_bytes)
        for source, num_bytes in self.before.pop(gone).items():
            del self.after[source][gone]
            if source != kept:
                self._connect(source, kept, num_bytes)

    def join_cycles(self, groups: list[list[int]]) -> None:
        """Merge each group, and everything on a path between two of its members."""
        digraph = nx.DiGraph()
        digraph.add_nodes_from(self.members)
        digraph.add_edges_from((a, b) for a in self.members for b in self.after[a])
        for group in groups:
            digraph.add_edges_from(zip(group, group[1:], strict=False))
            digraph.add_edges_from(zip(group[1:], group, strict=False))
        for component in nx.strongly_connected_components(digraph):
            first, *others = sorted(component)
            for other in others:
                self.join(first, other)

    def join_isolated(self) -> None:
        """Merge each unit without neighbours (a counter of batches) into the one before it."""
        previous: int | None = None
        for unit in sorted(self.members):
            if self.before[unit] or self.after[unit]:
                previous = unit
            elif previous is not None and self.label[unit] == self.label[previous]:
                self.join(previous, unit)

    def fuse_cheap(self) -> None:
        """Merge cheap units into neighbours until none is left that can be, or as few units as
        stages."""
        share = sum(self.seconds.values()) / self.how.num_stages
        pending = sorted(self.members)
        while pending:
            changed = []
            for unit in pending:
                if len(self.members) <= self.how.num_stages:
                    return
                if unit in self.members and self.seconds[unit] <= _CHEAP * share:
                    host = self._host(unit, _LARGEST * share)
                    if host is not None:
                        first, second = min(unit, host), max(unit, host)
                        self.join(first, second)
                        changed += [first, *self.after[first], *self.before[first]]
            pending = sorted(set(changed) & self.members.keys())

    def _host(self, unit: int, largest: float) -> int | None:
        """The neighbour that `unit` may join without making a cycle, over the heaviest edge."""
        options = []
        if len(self.before[unit]) == 1:
            options += [(-size, other) for other, size in self.before[unit].items()]
        if len(self.after[unit]) == 1:
            options += [(-size, other) for other, size in self.after[unit].items()]
        for _, other in sorted(options):
            together = self.seconds[unit] + self.seconds[other]
            fits = together <= max(largest, _NEGLIGIBLE * self.seconds[other])
            if (fits or self.seconds[unit] == 0.0) and self.label[unit] == self.label[other]:
                return other
        return None

    def units(self) -> tuple[tuple[int, ...], ...]:
        """Units in a topological order near program order."""
        digraph = nx.DiGraph()
        digraph.add_nodes_from(sorted(self.members))
        digraph.add_edges_from((a, b) for a in sorted(self.members) for b in sorted(self.after[a]))
        first = {unit: min(members) for unit, members in self.members.items()}
        order = nx.lexicographical_topological_sort(digraph, key=first.__getitem__)
        return tuple(tuple(sorted(self.members[unit])) for unit in order)


def _cut_program_order(
    graph: Graph, units: tuple[tuple[int, ...], ...], how: Coarsening
) -> tuple[tuple[int, ...], ...]:
    """Join consecutive units between the positions where locally least crosses."""
    crossing = _crossing_bytes(graph, units)
    labels = [how.labels.get(unit[0]) for unit in units]
    forced = {i for i in range(1, len(units)) if labels[i] != labels[i - 1]}
    window = 0
    while True:
        cuts = sorted(forced | _local_minima(crossing, window))
        if len(cuts) < max(how.max_units, 1) or window >= len(units):
            break
        window += 1
    seconds = [sum(how.seconds[node] for node in unit) for unit in units]
    bounds = _split_heavy([0, *cuts, len(units)], seconds, crossing, how)
    return tuple(
        tuple(sorted(node for unit in units[a:b] for node in unit))
        for a, b in zip(bounds, bounds[1:], strict=False)
    )


def _split_heavy(
    bounds: list[int], seconds: list[float], crossing: list[int], how: Coarsening
) -> list[int]:
    """`bounds` with the heaviest intervals split while fewer than `max_units` result.

    Intervals of equal weight (repeated blocks) are split all or none.
    """
    prefix = [0.0, *itertools.accumulate(seconds)]
    bounds = list(bounds)
    fine = _FINE * prefix[-1] / how.num_stages
    settled: set[tuple[int, int]] = set()
    while True:
        weights = {
            (a, b): prefix[b] - prefix[a]
            for a, b in zip(bounds, bounds[1:], strict=False)
            if b - a > 1 and (a, b) not in settled
        }
        heaviest = max(weights.values(), default=0.0)
        alike = [pair for pair, weight in weights.items() if weight > 0.99 * heaviest]
        if heaviest <= fine or len(bounds) - 1 + len(alike) > how.max_units:
            return bounds
        places = {pair: _middle(*pair, prefix, crossing) for pair in alike}
        settled.update(pair for pair, place in places.items() if place is None)
        bounds = sorted([*bounds, *(place for place in places.values() if place is not None)])


def _middle(first: int, last: int, prefix: list[float], crossing: list[int]) -> int | None:
    """Where to split [first, last): least crossing bytes, neither part light; None if nowhere."""
    least = _MIDDLE * (prefix[last] - prefix[first])
    places = [
        place
        for place in range(first + 1, last)
        if prefix[place] - prefix[first] >= least and prefix[last] - prefix[place] >= least
    ]
    return min(places, key=lambda place: (crossing[place], place), default=None)


def _crossing_bytes(graph: Graph, units: tuple[tuple[int, ...], ...]) -> list[int]:
    """Bytes of values that are computed before each unit and read by it or a later one."""
    place = {node: index for index, unit in enumerate(units) for node in unit}
    read_by = users(graph)
    change = [0] * (len(units) + 1)
    for node, index in place.items():
        for value in graph.nodes[node].outputs:
            last = max((place[user] for user in read_by[value] if user in place), default=index)
            if last > index:
                num_bytes = graph.values[value].type.num_bytes
                change[index + 1] += num_bytes
                change[last + 1] -= num_bytes
    total, crossing = 0, []
    for step in change[:-1]:
        total += step
        crossing.append(total)
    return crossing


def _local_minima(crossing: list[int], window: int) -> set[int]:
    """Positions where no more crosses than within `window` around, the first of equal ones."""
    found = set()
    for place in range(1, len(crossing)):
        earlier = crossing[max(1, place - window) : place]
        later = crossing[place + 1 : place + 1 + window]
        here = crossing[place]
        if all(here < other for other in earlier) and all(here <= other for other in later):
            found.add(place)
    return found
