"""Cut a graph whose nodes have devices into pieces: what a device runs without waiting in between.

The depth of a node is the largest number of changes of device on a path that leads to it. Nodes of
one device and depth are a piece. Every edge between pieces leads to a greater depth, so pieces in
order of depth are a topological order of them, and no path needs more of them than changes of
device. A node whose results only its own device needs may wait for them in a later piece, where
that leaves fewer pieces. Where devices do not wait for each other in turn, each has one piece.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import networkx as nx

from ...compiler.ir.graph import Graph, producers, users
from ...compiler.ir.plan import Stage
from ..replicate import needed_replicas

__all__ = ["fused_pieces", "make_pieces", "ordered_pieces"]


def make_pieces(
    graph: Graph, homes: Mapping[int, int], replicated: frozenset[int], *, late: bool = True
) -> tuple[Stage, ...]:
    """Pieces as stages, in a topological order.

    Args:
        homes: node -> device, of every node that is not in `replicated`.
        replicated: nodes that stand in each piece that needs them.
        late: let nodes wait for a later piece of their device.
    """
    if _is_contiguous(graph, homes):
        groups = [[n for n in homes if homes[n] == d] for d in sorted(set(homes.values()))]
        return ordered_pieces(graph, homes, replicated, groups)
    depth = _depths(graph, homes)
    if late:
        _delay(graph, homes, depth)
    pieces: dict[tuple[int, int], set[int]] = defaultdict(set)
    for node, device in homes.items():
        pieces[depth[node], device].add(node)
    order = sorted(pieces)
    return _as_stages(
        graph, replicated, [device for _, device in order], [pieces[k] for k in order]
    )


def fused_pieces(
    graph: Graph, homes: Mapping[int, int], pieces: Iterable[Iterable[int]]
) -> list[set[int]]:
    """Fewer pieces that take no longer: those that follow each other on a device are one if the
    first has nothing to send and the second needs nothing more from elsewhere.

    Args:
        pieces: those of each device in its order.
    """
    made_by, readers = producers(graph), users(graph)
    groups: list[set[int]] = []
    last: dict[int, set[int]] = {}  # device -> its last piece so far
    received: dict[int, set[int]] = defaultdict(set)  # device -> values from elsewhere
    sends: dict[int, bool] = {}  # device -> whether its last piece does
    for nodes in pieces:
        own = set(nodes)
        device = homes[min(own)]
        read = {value for node in own for value in graph.nodes[node].inputs}
        foreign = {v for v in read if homes.get(made_by.get(v, -1), device) != device}
        if device in last and not sends[device] and foreign <= received[device]:
            last[device] |= own
        else:
            groups.append(own)
            last[device] = own
            sends[device] = False
        received[device] |= foreign
        used = {u for node in own for v in graph.nodes[node].outputs for u in readers[v]}
        sends[device] |= any(homes.get(user, device) != device for user in used)
    return groups


def ordered_pieces(
    graph: Graph,
    homes: Mapping[int, int],
    replicated: frozenset[int],
    pieces: Iterable[Iterable[int]],
) -> tuple[Stage, ...]:
    """Given pieces as stages, in a topological order in which each device keeps its order."""
    groups = [set(nodes) for nodes in pieces]
    piece_of = {node: index for index, nodes in enumerate(groups) for node in nodes}
    devices = [homes[min(nodes)] for nodes in groups]
    made_by = producers(graph)
    quotient = nx.DiGraph()
    quotient.add_nodes_from(range(len(groups)))
    for node, index in piece_of.items():
        sources = {piece_of.get(made_by.get(value, -1)) for value in graph.nodes[node].inputs}
        quotient.add_edges_from((s, index) for s in sources - {None, index})
    last: dict[int, int] = {}
    for index, device in enumerate(devices):
        if device in last:
            quotient.add_edge(last[device], index)
        last[device] = index
    order = list(nx.lexicographical_topological_sort(quotient))
    return _as_stages(
        graph, replicated, [devices[index] for index in order], [groups[index] for index in order]
    )


def _as_stages(
    graph: Graph,
    replicated: frozenset[int],
    devices: Sequence[int],
    groups: Sequence[set[int]],
) -> tuple[Stage, ...]:
    """Stages with the replicated nodes that they need, and the last with those that none needs."""
    for nodes in groups:
        nodes.update(needed_replicas(graph, replicated, nodes))
    placed = set().union(*groups)
    groups[-1].update(node.id for node in graph.nodes if node.id not in placed)
    return tuple(
        Stage(index, (device,), tuple(sorted(nodes)))
        for index, (device, nodes) in enumerate(zip(devices, groups, strict=True))
    )


def _is_contiguous(graph: Graph, homes: Mapping[int, int]) -> bool:
    """Whether no device waits for one that waits for it."""
    made_by = producers(graph)
    quotient = nx.DiGraph()
    for node, device in homes.items():
        sources = {homes.get(made_by.get(value, -1)) for value in graph.nodes[node].inputs}
        quotient.add_edges_from((source, device) for source in sources - {None, device})
    return bool(nx.is_directed_acyclic_graph(quotient))


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
