"""Which nodes are recomputed in every stage that needs them instead of being sent.

Of the nodes that may be replicated at all (`compiler/ir/replicable.py`: masks, position tables,
factories), all that are cheap are: those that do heavy arithmetic or write a buffer stay in one
stage. Without any other node in the graph nothing is replicated, as stages need nodes of their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..compiler.ir.graph import Graph, OutputKind, producers
from ..compiler.ir.ops import Category
from ..compiler.ir.replicable import replicable_nodes

__all__ = ["complete_stages", "needed_replicas", "replicated_nodes"]

_HEAVY = (Category.ATTENTION, Category.CONVOLUTION, Category.RECURRENT)


def replicated_nodes(graph: Graph) -> frozenset[int]:
    """Ids of the nodes that stand in each stage that needs their results."""
    allowed = replicable_nodes(graph)
    written = {output.value for output in graph.outputs_of(OutputKind.BUFFER)}
    chosen: set[int] = set()
    kept: set[int] = set()
    for node in graph.nodes:
        fed_by_kept = not kept.isdisjoint(node.inputs)
        heavy = node.op.category in _HEAVY or not written.isdisjoint(node.outputs)
        if node.id in allowed and not heavy and not fed_by_kept:
            chosen.add(node.id)
        else:
            kept.update(node.outputs)
    return frozenset(chosen) if len(chosen) < len(graph.nodes) else frozenset()


def needed_replicas(
    graph: Graph, replicated: frozenset[int], nodes: Iterable[int]
) -> tuple[int, ...]:
    """Replicated nodes that `nodes` depend on, directly or through each other, ascending."""
    made_by = producers(graph)
    pending = list(nodes)
    found: set[int] = set()
    while pending:
        for value in graph.nodes[pending.pop()].inputs:
            source = made_by.get(value)
            if source in replicated and source not in found:
                found.add(source)
                pending.append(source)
    return tuple(sorted(found))


def complete_stages(graph: Graph, stages: Sequence[set[int]]) -> None:
    """Add to the nodes of each stage the replicated ones that it needs, and what no stage needs to
    the last one."""
    replicated = replicated_nodes(graph)
    for nodes in stages:
        nodes.update(needed_replicas(graph, replicated, nodes))
    placed = set().union(*stages)
    stages[-1].update(node.id for node in graph.nodes if node.id not in placed)
