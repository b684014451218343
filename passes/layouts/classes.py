"""Groups of equal nodes that take one decision together.

The i-th nodes of the instances of a repeated block are equal; those whose instances are a multiple
of the period apart form a class. With period one all instances look alike; with period two they
may alternate, as a stack of equal linear layers does best (columns, then rows). So an 80-layer
model is as large a problem as two of its layers.
"""

from __future__ import annotations

from collections.abc import Sequence

from ...compiler.ir.blocks import find_blocks
from ...compiler.ir.graph import Graph, Node

__all__ = ["node_classes", "node_signature"]

_PERIOD = 2
_MOST_CLASSES = 600  # above it, one period is enough of a problem


def node_classes(graph: Graph, nodes: Sequence[int] | None = None) -> tuple[tuple[int, ...], ...]:
    """Classes of equal nodes of `graph` (of `nodes` only), ascending, in order of the first."""
    chosen = set(range(len(graph.nodes)) if nodes is None else nodes)
    classes = _classes(graph, chosen, _PERIOD)
    return classes if len(classes) <= _MOST_CLASSES else _classes(graph, chosen, 1)


def _classes(graph: Graph, chosen: set[int], period: int) -> tuple[tuple[int, ...], ...]:
    groups: dict[object, list[int]] = {}
    tied: set[int] = set()
    for number, block in enumerate(find_blocks(graph)):
        looks: dict[tuple[object, ...], list[tuple[int, ...]]] = {}
        for instance in block.instances:
            look = tuple(node_signature(graph, graph.nodes[node]) for node in instance.nodes)
            if chosen.issuperset(instance.nodes):
                looks.setdefault(look, []).append(instance.nodes)
        for variant, alike in enumerate(looks.values()):
            for place, instance_nodes in enumerate(alike):
                tied.update(instance_nodes)
                for position, node in enumerate(instance_nodes):
                    key = (number, variant, position, place % period)
                    groups.setdefault(key, []).append(node)
    for node in sorted(chosen - tied):
        groups[node] = [node]
    return tuple(sorted(map(tuple, groups.values())))


def node_signature(graph: Graph, node: Node) -> tuple[object, ...]:
    """What strategies and costs of a node follow from, with the kinds of its operands aside."""
    values = graph.values
    return (
        node.op,
        repr(node.args),  # keeps 1, 1.0 and True apart, which compare equal
        repr(node.kwargs),
        tuple((values[i].type, values[i].requires_grad) for i in node.inputs),
        tuple((values[i].type, values[i].requires_grad) for i in node.outputs),
        node.random_draw is None,
    )
