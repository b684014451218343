"""Deeper networks from a public workload file, by repeating one of its layers: nothing downloaded.

An operator belongs to the last layer whose parameters (`layer.N.` in their names) it depends on;
what comes after the last layer is the head's. Backward operators belong where their colour does,
and sums of gradients where what they add up comes from.
"""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

import networkx as nx

__all__ = ["with_layers"]

_PARAMETER = re.compile(r"layer\.(\d+)\.")
_AFTER = re.compile(r"^cls\.|pooler")
_SHARED, _HEAD = -1, 1_000_000
Document = dict[str, Any]


def with_layers(document: Document, layers: int, accelerators: int) -> Document:
    """The public workload with so many layers and accelerators.

    The second layer is repeated. Its edges with the first one, which is alike, tell what edges
    there are between two copies.

    Raises:
        ValueError: the layers are fewer than those there are, or the first two are not alike.
    """
    layer = _layers(document)
    more = layers - 1 - max(number for number in layer.values() if number < _HEAD)
    if more < 0:
        raise ValueError(f"the file has {layers - more} layers, more than {layers}")
    nodes = {node["id"]: node for node in document["nodes"]}
    inner = [v for v in nodes if layer[v] == 1]
    twin = _twins(document, inner, [v for v in nodes if layer[v] == 0])
    first_free = max(nodes) + 1

    place = {v: number for number, v in enumerate(inner)}

    def copy(v: int, number: int) -> int:
        """Node of a copy of the layer; copy 0 is the layer itself. Other nodes have no copies."""
        if number == 0 or v not in place:
            return v
        return first_free + (number - 1) * len(inner) + place[v]

    edges: list[Document] = []
    for edge in document["edges"]:
        u, v = edge["sourceId"], edge["destId"]
        ends = layer[u], layer[v]
        pairs = [(u, v)]
        if ends == (0, 1):
            pairs += [(copy(twin[u], n), copy(v, n + 1)) for n in range(more)]
        elif ends == (1, 0):
            pairs += [(copy(u, n + 1), copy(twin[v], n)) for n in range(more)]
        elif ends in ((1, 1), (_SHARED, 1), (1, _SHARED)):
            pairs = [(copy(u, n), copy(v, n)) for n in range(more + 1)]
        elif 1 in ends:
            pairs = [(copy(u, more), copy(v, more))]
        edges += [{**edge, "sourceId": a, "destId": b} for a, b in pairs]
    copies = [_copied(nodes[v], copy(v, n), n) for n in range(1, more + 1) for v in inner]
    return {
        **document,
        "maxFPGAs": accelerators,
        "nodes": [*document["nodes"], *copies],
        "edges": edges,
    }


def _copied(node: Document, identity: int, number: int) -> Document:
    colour = {"colorClass": 10_000 * number + node["colorClass"]} if "colorClass" in node else {}
    return {**node, "id": identity, "name": f"{node['name']}+{number}", **colour}


def _layers(document: Document) -> dict[int, int]:
    """Layer of every node; `_SHARED`: before all layers or for all; `_HEAD`: after them."""
    nodes = {node["id"]: node for node in document["nodes"]}
    graph = nx.DiGraph()
    graph.add_nodes_from(nodes)
    graph.add_edges_from((edge["sourceId"], edge["destId"]) for edge in document["edges"])
    layer: dict[int, int] = {}
    of_colour: dict[int, int] = {}
    for v in nx.lexicographical_topological_sort(graph):
        colour = nodes[v].get("colorClass")
        before = [layer[u] for u in graph.predecessors(v)]
        named = _PARAMETER.search(nodes[v]["name"])
        if nodes[v]["isBackwardNode"]:
            layer[v] = of_colour.get(colour, max(before, default=_HEAD))
            continue
        own = int(named[1]) if named else _HEAD if _AFTER.search(nodes[v]["name"]) else _SHARED
        layer[v] = max([own, *before])
        if colour is not None:
            of_colour[colour] = max(layer[v], of_colour.get(colour, _SHARED))
    return layer


def _twins(document: Document, inner: list[int], other: list[int]) -> dict[int, int]:
    """The node of the one layer for each node of the other, which has the same form and figures."""
    graphs = []
    for members in (other, inner):
        graph = nx.DiGraph()
        inside = set(members)
        for node in document["nodes"]:
            if node["id"] in inside:
                key = (round(node["fpgaLatency"], 9), node["size"], bool(node["isBackwardNode"]))
                graph.add_node(node["id"], key=key)
        reach: defaultdict[int, list[tuple[bool, float]]] = defaultdict(list)
        for edge in document["edges"]:
            u, v = edge["sourceId"], edge["destId"]
            if u in inside and v in inside:
                graph.add_edge(u, v)
            elif u in inside:
                reach[u].append((True, edge["cost"]))
            elif v in inside:
                reach[v].append((False, edge["cost"]))
        for v in members:
            graph.nodes[v]["key"] += (len(reach[v]), *sorted(reach[v]))
        graphs.append(graph)
    matcher = nx.isomorphism.DiGraphMatcher(*graphs, node_match=lambda a, b: a["key"] == b["key"])
    if not matcher.is_isomorphic():
        raise ValueError("the first two layers of the file are not alike")
    return dict(matcher.mapping)
