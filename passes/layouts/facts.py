"""What follows from a graph alone, whatever the mesh: found once, for all problems stated of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...compiler.ir.graph import Graph, Mode, Node, producers, users
from ...compiler.ir.ops import Category
from ...compiler.sharding.rules import strategies_of
from ...compiler.sharding.sharding import computed_from_parameters
from ...compiler.sharding.strategy import OpStrategy
from ...cost_models.analysis import batch_rows, batch_values, find_storages, weight_like_values
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
        signatures: by node; equal ones have equal strategies and costs.
        classes: of nodes that take one decision (see `classes.py`).
    """

    graph: Graph
    weights: frozenset[int]
    weight_like: frozenset[int]
    roots: tuple[int, ...]
    rows: int
    batched: frozenset[int]
    made_by: Mapping[int, int]
    read_by: Mapping[int, tuple[int, ...]]
    signatures: tuple[object, ...]
    classes: tuple[tuple[int, ...], ...]
    strategies: dict[object, tuple[OpStrategy, ...]] = field(default_factory=dict)
    pricers: dict[object, Any] = field(default_factory=dict)

    @staticmethod
    def of(graph: Graph) -> GraphFacts:
        trains = graph.mode is Mode.TRAIN
        numbers: dict[object, int] = {}  # small numbers compare faster than what they stand for
        looks = (node_signature(graph, node) for node in graph.nodes)
        return GraphFacts(
            graph=graph,
            weights=frozenset(computed_from_parameters(graph)) if trains else frozenset(),
            weight_like=weight_like_values(graph),
            roots=find_storages(graph).root,
            rows=batch_rows(graph),
            batched=batch_values(graph),
            made_by=producers(graph),
            read_by=users(graph),
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
