"""What can be recomputed: segments of the graph, and which nodes of a segment to run again.

Segments are the repeated blocks. Where those hold less than half of what backward keeps, the graph
is cut into about sqrt(n) segments of equal weight instead, with n the nodes that backward keeps
something of (Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016). Segments are
decided on one by one, so what others read of a segment is always kept.

`full` runs a whole segment again: only what enters and leaves it is kept. `selective` runs again
only what is cheap for the bytes it frees: not products, convolutions or random draws, but norms,
activations, softmax, and attention that holds its scores (Korthikanti et al., "Reducing Activation
Recomputation in Large Transformer Models", 2022). What it keeps is a minimum cut: the fewest bytes
from which everything that backward reads can be computed by such nodes.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import networkx as nx

from ..compiler.ir.blocks import find_blocks
from ..compiler.ir.graph import Graph, Node, producers
from ..compiler.ir.ops import Category
from ..cost_models.backward import StageSteps
from ..cost_models.memory_tables import MemoryModel, memory_model

__all__ = ["Segment", "find_segments", "full_recompute", "selective_recompute"]

_CHEAP = (
    Category.NORM,
    Category.SOFTMAX,
    Category.ELEMENTWISE,
    Category.REDUCTION,
    Category.INDEXING,
    Category.POOLING,
    Category.VIEW,
    Category.COPY,
    Category.FACTORY,
)
_HOLDS_SCORES = 2.0  # attention that keeps so many times its result beside it computes by products


@dataclass(frozen=True, slots=True)
class Segment:
    """Nodes that are decided on together, ascending. Segments of one `kind` are equal."""

    kind: int
    nodes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Kept:
    """What backward keeps of a graph when it recomputes nothing."""

    model: MemoryModel
    steps: StageSteps
    saved_bytes: tuple[float, ...]  # by node

    @staticmethod
    def of(graph: Graph) -> _Kept:
        model = memory_model(graph)
        steps = model.steps(range(len(graph.nodes)))
        saved = [0.0] * len(graph.nodes)
        for step in steps.forward:
            saved[step.node] += sum(steps.saved.get(storage, 0.0) for storage, _ in step.writes)
        return _Kept(model, steps, tuple(saved))


def find_segments(graph: Graph) -> tuple[Segment, ...]:
    """The segments of `graph`, in graph order; no node is in two."""
    return _find_segments(graph, _Kept.of(graph))


def full_recompute(graph: Graph) -> tuple[tuple[int, ...], ...]:
    """Per segment, the nodes to recompute so that only what enters and leaves it is kept."""
    return tuple(_inner(graph, segment.nodes) for segment in find_segments(graph))


def selective_recompute(graph: Graph) -> tuple[tuple[int, ...], ...]:
    """Per segment, the nodes to recompute so that least is kept and only cheap ones run again."""
    kept = _Kept.of(graph)
    chosen: dict[int, list[int]] = {}  # kind -> positions in its segments
    table = []
    for segment in _find_segments(graph, kept):
        inner = _inner(graph, segment.nodes)
        if segment.kind not in chosen:
            again = _cheapest_cut(kept, segment.nodes, set(inner))
            chosen[segment.kind] = [i for i, node in enumerate(segment.nodes) if node in again]
        nodes = (segment.nodes[position] for position in chosen[segment.kind])
        table.append(tuple(node for node in nodes if node in inner))
    return tuple(table)


def _find_segments(graph: Graph, kept: _Kept) -> tuple[Segment, ...]:
    blocks = [
        Segment(kind, instance.nodes)
        for kind, block in enumerate(find_blocks(graph))
        for instance in block.instances
    ]
    inside = (node for segment in blocks for node in _inner(graph, segment.nodes))
    if 2 * sum(kept.saved_bytes[node] for node in inside) < sum(kept.saved_bytes):
        blocks = _even_segments(kept)
    return tuple(sorted(blocks, key=lambda segment: segment.nodes))


def _even_segments(kept: _Kept) -> list[Segment]:
    """Consecutive nodes, cut where the bytes kept come to equal shares."""
    total = sum(kept.saved_bytes)
    count = max(1, round(math.sqrt(sum(size > 0 for size in kept.saved_bytes))))
    groups: list[list[int]] = [[] for _ in range(count)]
    before = 0.0
    for node, size in enumerate(kept.saved_bytes):
        groups[min(int(count * before / total), count - 1) if total else 0].append(node)
        before += size
    return [Segment(kind, tuple(nodes)) for kind, nodes in enumerate(groups) if nodes]


def _inner(graph: Graph, nodes: Collection[int]) -> tuple[int, ...]:
    """Those of `nodes` no result of which is read outside, neither itself nor by a view."""
    inside = set(nodes)
    seen = {output.value for output in graph.outputs}
    seen.update(v for node in graph.nodes if node.id not in inside for v in node.inputs)
    made_by = producers(graph)
    outer = set()
    for value in seen:
        while made_by.get(value) in inside:
            node = graph.nodes[made_by[value]]
            outer.add(node.id)
            if node.op.category is not Category.VIEW or not node.inputs:
                break
            value = node.inputs[0]
    return tuple(node for node in nodes if node not in outer)


def _cheapest_cut(kept: _Kept, nodes: Iterable[int], inner: Collection[int]) -> set[int]:
    """The nodes of a segment that run again, by minimum cut between what may only be kept and what
    backward reads. A node that may run again is an edge as wide as what it makes is large; of
    others, each storage is."""
    steps = {step.node: step for step in kept.steps.forward}
    network = nx.DiGraph()
    network.add_nodes_from(("kept", "read"))
    made: dict[int, object] = {}  # storage -> vertex behind its edge
    cheap = [
        node
        for node in nodes
        if node in inner and _is_cheap(kept.model, kept.model.graph.nodes[node])
    ]
    for node in nodes:
        writes = steps[node].writes
        if node in cheap:
            _add_edge(network, node, writes, kept.steps.saved)
            made.update((storage, (node, "out")) for storage, _ in writes)
            read = (made[storage] for storage in steps[node].reads if storage in made)
            network.add_edges_from((vertex, (node, "in")) for vertex in read)
            continue
        for storage, size in writes:
            key = (node, storage)
            _add_edge(network, key, [(storage, size)], kept.steps.saved)
            network.add_edge("kept", (key, "in"))
            made[storage] = (key, "out")
    _, (_, wanted) = nx.minimum_cut(network, "kept", "read")
    return {node for node in cheap if (node, "in") in wanted}


def _add_edge(
    network: nx.DiGraph,
    key: object,
    writes: Sequence[tuple[int, float]],
    saved: Collection[int],
) -> None:
    """What is made, as wide as it is large; if backward reads it, it must come from somewhere."""
    network.add_edge((key, "in"), (key, "out"), capacity=sum(size for _, size in writes))
    if any(storage in saved for storage, _ in writes):
        network.add_edge((key, "out"), "read")


def _is_cheap(model: MemoryModel, node: Node) -> bool:
    if node.op.category is Category.ATTENTION:
        extra = model.adjoints[node.id].extra_bytes
        return extra > _HOLDS_SCORES * sum(model.sizes[value] for value in node.outputs)
    return node.op.category in _CHEAP and node.random_draw is None
