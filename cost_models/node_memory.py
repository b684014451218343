"""Memory figures per node that add up, for planners that do not know the stages yet.

    stage peak <= static + in_flight * (sum saved + received) + sum deferred + max transient

where `received` are bytes of boundary values read.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from ..compiler.ir.graph import Graph
from ..compiler.ir.memo import once_per_object
from .backward import StageSteps
from .liveness import live_bytes
from .memory_tables import MemoryModel, memory_model
from .recompute import nodes_with_inputs

__all__ = ["NodeMemory", "memory_profile", "node_memory"]


@dataclass(frozen=True, slots=True)
class NodeMemory:
    """Additive memory figures of one node, one microbatch; see the module docstring.

    Args:
        saved_bytes: storages made by this node that some backward reads.
        transient_bytes: what else is live while the node or its backward runs.
        deferred_bytes: gradients that wait for its weight gradient, from B to W.
    """

    saved_bytes: int
    transient_bytes: int
    deferred_bytes: int


def memory_profile(
    graph: Graph,
    *,
    batch_fraction: float = 1.0,
    backend: str = "cpu",
    recomputed: Collection[int] = (),
) -> tuple[NodeMemory, ...]:
    """Additive memory figures of every node of `graph`, in node order.

    Args:
        recomputed: nodes whose results backward computes again.
    """
    return _memory_profile(graph, batch_fraction, backend, frozenset(recomputed))


@once_per_object
def _memory_profile(
    graph: Graph, batch_fraction: float, backend: str, recomputed: frozenset[int]
) -> tuple[NodeMemory, ...]:
    model = memory_model(graph, batch_fraction=batch_fraction, backend=backend)
    return node_memory(model, model.steps(range(len(graph.nodes)), recomputed=recomputed))


def node_memory(model: MemoryModel, steps: StageSteps) -> tuple[NodeMemory, ...]:
    """`memory_profile` from the steps of all nodes of the model's graph."""
    graph = model.graph
    maker = {storage: step.node for step in steps.forward for storage, _ in step.writes}
    saved = [0.0] * len(graph.nodes)
    for storage, size in steps.saved.items():
        if storage in maker:
            saved[maker[storage]] += size
    deferred = _deferred(model, steps)
    transient = _transients(steps, len(graph.nodes))
    return tuple(
        NodeMemory(math.ceil(saved[i]), math.ceil(transient[i]), math.ceil(deferred[i]))
        for i in range(len(graph.nodes))
    )


def _deferred(model: MemoryModel, steps: StageSteps) -> list[float]:
    """Per node, arriving gradients that its weight gradient reads (less what B has freed)."""
    table = [0.0] * len(model.graph.nodes)
    backward = (*steps.backward_input, *steps.backward_weight)
    gradients = {
        storage: size
        for step in backward
        for storage, size in step.writes
        if storage not in steps.copies and storage not in steps.under_way
    }
    joined = nodes_with_inputs(backward, steps.copies)
    readers: set[tuple[int, int]] = set()
    for step in backward:
        if not _is_weight_step(model, step.node) or step.node in joined:
            continue
        for storage in step.reads:
            if storage in gradients and (step.node, storage) not in readers:
                readers.add((step.node, storage))
                table[step.node] += gradients[storage]
    return table


def _is_weight_step(model: MemoryModel, node: int) -> bool:
    return any(index in model.weights for index in model.graph.nodes[node].inputs)


def _transients(steps: StageSteps, count: int) -> list[float]:
    """Per node, live bytes beside saved ones while its forward or backward runs."""
    table = [0.0] * count
    forward = live_bytes(steps.forward, steps.received, steps.outputs | set(steps.saved))
    saved_so_far = 0.0
    for step, live in zip(steps.forward, forward.at_step, strict=True):
        saved_so_far += sum(steps.saved[s] for s, _ in step.writes if s in steps.saved)
        table[step.node] = max(table[step.node], live - saved_so_far)
    backward = (*steps.backward_input, *steps.backward_weight)
    gradients = live_bytes(backward, steps.arriving, set(steps.returned))
    for step, live in zip(backward, gradients.at_step, strict=True):
        table[step.node] = max(table[step.node], live)
    return table
