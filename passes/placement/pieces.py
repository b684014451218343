"""Cut a graph whose nodes have devices into pieces: what a device runs without waiting in between.

The depth of a node is the largest number of changes of device on a path that leads to it. Nodes of
one device and depth are a piece. Every edge between pieces leads to a greater depth, so pieces in
order of depth are a topological order of them, and no path needs more of them than changes of
device. A node whose results only its own device needs may wait for them in a later piece, where
that leaves fewer pieces.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ...compiler.ir.graph import Graph, producers, users
from ...compiler.ir.plan import Stage
from ..replicate import needed_replicas

__all__ = ["StageEdge", "make_pieces", "stage_edges"]


@dataclass(frozen=True, slots=True)
class StageEdge:
    """Values that one stage computes and another reads.

    Args:
        values: ids, ascending.
    """

    source: int
    target: int
    values: tuple[int, ...]


def make_pieces(
    graph: Graph, homes: Mapping[int, int], replicated: frozenset[int], *, late: bool = True
) -> tuple[Stage, ...]:
    """Pieces as stages, in a topological order.

    Args:
        homes: node -> device, of every node that is not in `replicated`.
        replicated: nodes that stand in each piece that needs them.
        late: let nodes wait for a later piece of their device.
    """
    depth = _depths(graph, homes)
    if late:
        _delay(graph, homes, depth)
    pieces: dict[tuple[int, int], set[int]] = defaultdict(set)
    for node, device in homes.items():
        pieces[depth[node], device].add(node)
    groups = [pieces[key] for key in sorted(pieces)]
    for nodes in groups:
        nodes.update(needed_replicas(graph, replicated, nodes))
    placed = set().union(*groups)
    groups[-1].update(node.id for node in graph.nodes if node.id not in placed)
    return tuple(
        Stage(index, (device,), tuple(sorted(nodes)))
        for index, ((_, device), nodes) in enumerate(zip(sorted(pieces), groups, strict=True))
    )


def _depths(graph: Graph, homes: Mapping[int, int]) -> dict[int, int]:
    made_by = producers(graph)
    depth: dict[int, int] = {}
    for node in graph.nodes:
        if node.id in homes:
            sources = {made_by[v] for v in node.inputs if made_by.get(v) in homes}
            depth[node.id] = max(
                (depth[s] + (homes[s] != homes[node.id]) for s in sources), default=0
            )
    return depth


def _delay(graph: Graph, homes: Mapping[int, int], depth: dict[int, int]) -> None:
    readers = users(graph)
    for node in reversed(graph.nodes):
        found = {u for value in node.outputs for u in readers[value] if u in homes}
        if node.id in homes and found and {homes[u] for u in found} == {homes[node.id]}:
            depth[node.id] = min(depth[u] for u in found)


def stage_edges(graph: Graph, stages: Sequence[Stage]) -> tuple[StageEdge, ...]:
    """Which stages read what of which others; a value comes from the first that computes it."""
    made_by = producers(graph)
    first: dict[int, int] = {}
    for stage in stages:
        for node in stage.nodes:
            first.setdefault(node, stage.index)
    found: dict[tuple[int, int], set[int]] = defaultdict(set)
    for stage in stages:
        own = set(stage.nodes)
        for node in stage.nodes:
            for value in graph.nodes[node].inputs:
                source = made_by.get(value)
                if source is not None and source not in own:
                    found[first[source], stage.index].add(value)
    return tuple(
        StageEdge(source, target, tuple(sorted(values)))
        for (source, target), values in sorted(found.items())
    )
