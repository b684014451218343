"""What a stage problem is stated from: graph, units, cluster, and what the user fixed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ...compiler.ir.cluster import Cluster
from ...compiler.ir.graph import Graph
from ...compiler.ir.plan import OptimizerModel
from ...cost_models.collectives import Network
from ...cost_models.parameters import ParameterFigures

__all__ = ["Statement", "unit_name"]


@dataclass(frozen=True, slots=True)
class Statement:
    """Everything but the number of microbatches that a stage problem follows from.

    Args:
        units: node ids of every unit, in topological order.
        replicas: for every unit, the replicated nodes that it needs.
        batch_size: rows of a step.
        pins, device_pins: see `PlanOptions`.
        recomputed: nodes whose results backward computes again.
        rerun: those of them whose results it really needs.
        network: who meets in the collectives of a local graph.
        parameters: figures of trained parameters by value id, where they are not those of a
            parameter that one rank trains alone.
    """

    graph: Graph
    units: tuple[tuple[int, ...], ...]
    replicas: tuple[tuple[int, ...], ...]
    cluster: Cluster
    batch_size: int
    optimizer: OptimizerModel
    schedule: str
    memory_limit_bytes: int | None = None
    pins: tuple[tuple[str, int], ...] = ()
    device_pins: tuple[tuple[str, int], ...] = ()
    recomputed: tuple[int, ...] = ()
    rerun: frozenset[int] = frozenset()
    network: Network | None = None
    parameters: Mapping[int, ParameterFigures] = field(default_factory=dict)


def unit_name(graph: Graph, nodes: tuple[int, ...]) -> str:
    """The module path that the first and last node of a unit share, or both paths."""
    paths = [graph.nodes[node].module_path for node in nodes]
    named = [path for path in paths if path] or [graph.nodes[nodes[0]].name]
    first, last = named[0], named[-1]
    return first if first == last else f"{first} .. {last}"
