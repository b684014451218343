"""Which nodes a plan may compute in several stages instead of sending their results.

Those that depend on no parameter, no randomness, no floating-point input of the user and no buffer
that the step changes: masks, position tables, rotary tables, factories. Their results are equal
wherever they are computed and carry no gradient.
"""

from __future__ import annotations

from .graph import Graph, Node, OutputKind, Value, ValueKind

__all__ = ["replicable_nodes"]


def replicable_nodes(graph: Graph) -> frozenset[int]:
    """Ids of the nodes that may stand in more than one stage."""
    changed = {output.target for output in graph.outputs_of(OutputKind.BUFFER)}
    free = {value.id for value in graph.values if _is_free(value, changed)}
    found: set[int] = set()
    for node in graph.nodes:
        if not _draws(node) and free.issuperset(node.inputs):
            found.add(node.id)
            free.update(node.outputs)
    return frozenset(found)


def _draws(node: Node) -> bool:
    return node.random_draw is not None or node.op.random


def _is_free(value: Value, changed: set[str]) -> bool:
    if value.kind is ValueKind.INPUT:
        return not value.type.is_float
    if value.kind is ValueKind.BUFFER:
        return not changed.intersection((value.origin, *value.aliases))
    return value.kind is ValueKind.CONSTANT and not value.requires_grad
