"""What follows from a graph alone, whatever the mesh: found once, for all problems stated of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...compiler.ir.graph import Graph, Mode, Node, ValueKind, producers, users
from ...compiler.ir.ops import Category
from ...compiler.sharding.rules import strategies_of
from ...compiler.sharding.sharding import computed_from_parameters
from ...compiler.sharding.strategy import OpStrategy
from ...cost_models.analysis import (
    batch_rows,
    batch_values,
    dependent_values,
    find_storages,
    weight_like_values,
)
from .classes import node_classes, node_signature

__all__ = ["GraphFacts"]


@dataclass(frozen=True, slots=True)
class GraphFacts:
    """Make it with `GraphFacts.of`; strategies are filled in as they are asked for, and pricers of
    the graph (see `choose.py`) as meshes are.

    Args:
        weights: values computed from parameters alone, in a graph that trains.
        weight_like: those whose adjoints are weight gradients (see `cost_models/analysis.py`).
        roots: by value, whose storage it shares.
        rows: of the batch that was captured.
        batched: values that grow with it.
        dependent: values that depend on it, whether they grow or not.
        first_in_backward: nodes whose backward comes before, or completes, the first gradient of a
            parameter.
        signatures: by node; equal ones have equal strategies and costs.
        classes: of nodes that take one decision (see `classes.py`).
    """

    graph: Graph
    weights: frozenset[int]
    weight_like: frozenset[int]
    roots: tuple[int, ...]
    rows: int
    batched: frozenset[int]
    dependent: frozenset[int]
    made_by: Mapping[int, int]
    read_by: Mapping[int, tuple[int, ...]]
    first_in_backward: frozenset[int]
    signatures: tuple[object, ...]
    classes: tuple[tuple[int, ...], ...]
    strategies: dict[object, tuple[OpStrategy, ...]] = field(default_factory=dict)
    pricers: dict[object, Any] = field(default_factory=dict)

    @staticmethod
    def of(graph: Graph) -> GraphFacts:
        trains = graph.mode is Mode.TRAIN
        numbers: dict[object, int] = {}  # small numbers compare faster than what they stand for
        looks = (node_signature(graph, node) for node in graph.nodes)
        made_by, read_by = producers(graph), users(graph)
        return GraphFacts(
            graph=graph,
            weights=frozenset(computed_from_parameters(graph)) if trains else frozenset(),
            weight_like=weight_like_values(graph),
            roots=find_storages(graph).root,
            rows=batch_rows(graph),
            batched=batch_values(graph),
            dependent=dependent_values(graph),
            made_by=made_by,
            read_by=read_by,
            first_in_backward=_first_in_backward(graph, read_by),
            signatures=tuple(numbers.setdefault(look, len(numbers)) for look in looks),
            classes=node_classes(graph),
        )

    def strategies_of(self, node: Node, parts: int) -> tuple[OpStrategy, ...]:
        """All strategies of `node` over an axis of `parts`."""
        # what indices can point to depends on what they were made from
        origin = node.inputs if node.op.category is Category.INDEXING else ()
        key = parts, self.signatures[node.id], origin
        if key not in self.strategies:
            self.strategies[key] = strategies_of(self.graph, node, parts)
        return self.strategies[key]


def _first_in_backward(graph: Graph, read_by: Mapping[int, tuple[int, ...]]) -> frozenset[int]:
    """The last reader of parameters and all that is computed from it; of several, none of which is
    computed from another, what is computed from all of them."""
    trained = (value for value in graph.values_of(ValueKind.PARAMETER) if value.requires_grad)
    readers = {node for value in trained for node in read_by[value.id]}
    after: dict[int, frozenset[int]] = {}  # last readers that a node is computed from, or is
    lasts = set(readers)
    made_by = producers(graph)
    for node in graph.nodes:
        sources = [after[made_by[value]] for value in node.inputs if value in made_by]
        before = frozenset[int]().union(*sources)
        if node.id in readers:
            lasts -= before
            before |= {node.id}
        after[node.id] = before
    return frozenset(node for node, before in after.items() if lasts and lasts <= before)
