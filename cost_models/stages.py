"""Seconds of a stage's actions and of the optimizer, from the prices of its nodes.

The backward of a stage runs as B, what its returned gradients depend on, and W, the rest. A
node's input gradient therefore counts in W when no differentiable boundary input lies before it
(all of the first stage).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from ..compiler.ir.cluster import DeviceType, Host, Link
from ..compiler.ir.graph import Graph, Mode, ValueKind
from ..compiler.ir.ops import Category
from ..compiler.ir.plan import OptimizerModel
from .collectives import Network
from .memory import memory_model
from .ops import NodeCost, price
from .prefetch import overlapped_seconds

__all__ = ["StageSeconds", "optimizer_seconds", "stage_seconds"]

_OPTIMIZER_KERNELS = 12  # launches of one update of AdamW
# where a cluster does not say: PCIe 4.0 x16, and memory of one socket
_TYPICAL_HOST = Host(Link(1e-5, 20e9), 1 << 37, 50e9)


@dataclass(frozen=True, slots=True)
class StageSeconds:
    """Seconds of one microbatch through one stage."""

    forward: float
    backward_input: float
    backward_weight: float

    @property
    def backward(self) -> float:
        return self.backward_input + self.backward_weight


def stage_seconds(
    graph: Graph,
    device_type: DeviceType,
    *,
    batch_fraction: float = 1.0,
    recomputed: Collection[int] = (),
    network: Network | None = None,
) -> StageSeconds:
    """Predicted seconds of the stage graph `graph` on `device_type`, one microbatch.

    Args:
        network: who meets in the collectives of the graph, if it holds some.
        recomputed: nodes whose results backward computes again. Weight gradients that it then
            computes with the input gradients (see `recompute.py`) count there.
    """
    costs = price(graph, device_type, batch_fraction=batch_fraction, network=network)
    whole = sum(cost.forward_seconds for cost in costs)
    forward = overlapped_seconds([cost.forward_seconds for cost in costs], _gathered(graph))
    if graph.mode is Mode.INFER:
        return StageSeconds(forward, 0.0, 0.0)
    reached = {value.id for value in graph.values_of(ValueKind.BOUNDARY) if value.requires_grad}
    first, second = 0.0, 0.0
    for node, cost in zip(graph.nodes, costs, strict=True):
        second += cost.backward_weight_seconds
        if any(value in reached for value in node.inputs):
            reached.update(node.outputs)
            first += cost.backward_input_seconds
        else:
            second += cost.backward_input_seconds
    plain = StageSeconds(forward, first, second)
    if not recomputed:
        return plain
    again = _recomputing(graph, costs, plain, recomputed)
    # backward gathers again, and has more to hide it behind
    hidden = min(whole - forward, again.backward_weight)
    return replace(again, backward_weight=again.backward_weight - hidden)


def _gathered(graph: Graph) -> list[float]:
    """By node, bytes of the parameter that it gathers."""
    return [
        float(graph.values[node.outputs[0]].type.num_bytes)
        if node.op.category is Category.COLLECTIVE
        and node.op.packet == "all_gather"
        and graph.values[node.inputs[0]].kind is ValueKind.PARAMETER
        else 0.0
        for node in graph.nodes
    ]


def _recomputing(
    graph: Graph, costs: Sequence[NodeCost], plain: StageSeconds, recomputed: Collection[int]
) -> StageSeconds:
    """`plain` with what runs again, and with the weight gradients that join the input gradients."""
    steps = memory_model(graph).steps(range(len(graph.nodes)), recomputed=recomputed)
    again = [
        {step.node for step in part if any(s in steps.copies for s, _ in step.writes)}
        for part in (steps.backward_input, steps.backward_weight)
    ]
    early = {step.node for step in steps.backward_input}
    moved = early - {step.node for step in steps.backward_weight}
    weights = sum(costs[node].backward_weight_seconds for node in moved)
    first, second = (sum(costs[node].forward_seconds for node in nodes) for nodes in again)
    return StageSeconds(
        plain.forward,
        plain.backward_input + first + weights,
        plain.backward_weight + second - weights,
    )


def optimizer_seconds(
    device_type: DeviceType,
    optimizer: OptimizerModel,
    *,
    parameter_bytes: float,
    num_parameters: int = 1,
    offloaded_bytes: float = 0.0,
) -> float:
    """Seconds of one update of parameters of `parameter_bytes` in `num_parameters` tensors, and of
    others of `offloaded_bytes` in the memory of the host.

    The latter's gradients go to the host, are used there, and the new weights come back, one after
    the other; weights are on the host from the step before.

    Memory-bound: gradient, parameter and states are read, parameter and states written, the
    gradient is zeroed. CUDA updates all tensors in a few launches, a CPU one after the other.
    """
    passes = 4 + 2 * optimizer.state_bytes_per_parameter_byte
    away = 0.0
    if offloaded_bytes:
        host = device_type.host or _TYPICAL_HOST
        away = 2 * host.link.seconds(offloaded_bytes)
        away += offloaded_bytes * passes / host.memory_bytes_per_second
    if not parameter_bytes:
        return away
    moved = parameter_bytes * passes
    launches = num_parameters if device_type.backend == "cpu" else min(num_parameters, 1)
    return (
        away
        + moved / device_type.memory_bytes_per_second
        + launches * _OPTIMIZER_KERNELS * device_type.overhead_seconds
    )
