"""Seconds of a stage's actions and of the optimizer, from the prices of its nodes.

The backward of a stage runs as B, what its returned gradients depend on, and W, the rest. A
node's input gradient therefore counts in W when no differentiable boundary input lies before it
(all of the first stage).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from ..compiler.ir.cluster import PHASES, DeviceType, Host, Link
from ..compiler.ir.graph import Graph, Mode, ValueKind, users
from ..compiler.ir.memo import once_per_object
from ..compiler.ir.ops import Category
from ..compiler.ir.plan import OptimizerModel
from ..compiler.ir.program import GradientPart, StageProgram
from .collectives import Network
from .links import reduce_scatter_seconds
from .memory_tables import memory_model, rerun_nodes
from .ops import NodeCost, price_once
from .prefetch import late_seconds, overlapped_seconds
from .recompute import with_reruns

__all__ = [
    "StageSeconds",
    "hidden_again_seconds",
    "hidden_sum_seconds",
    "in_weights",
    "optimizer_seconds",
    "part_shares",
    "reached_values",
    "stage_seconds",
]

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
    recomputed: Collection[int] = (),
    network: Network | None = None,
    kept: Sequence[GradientPart] = (),
) -> StageSeconds:
    """Predicted seconds of the stage graph `graph` on `device_type`, one microbatch.

    Args:
        network: who meets in the collectives of the graph, if it holds some.
        recomputed: nodes whose results backward computes again. Weight gradients that it then
            computes with the input gradients (see `recompute.py`) count there.
        kept: gradients that are summed as soon as they are complete (ZeRO 2), in `network`.
    """
    costs = price_once(graph, device_type, network=network)
    seconds = [cost.forward_seconds for cost in costs]
    waiting = _waiting(graph, network, kept, "all_gather")
    forward = overlapped_seconds(seconds, _gathered(graph), waiting)
    if graph.mode is Mode.INFER:
        return StageSeconds(forward, 0.0, 0.0)
    weights = in_weights(graph, costs)
    first = sum(cost.backward_seconds for cost in costs) - sum(weights)
    sums = _sums_kept(graph, network, kept)
    own = sum(seconds for table in sums.values() for seconds, _ in table)
    found = StageSeconds(forward, first, sum(weights) + own)
    hidden = hidden_sum_seconds(graph, weights, network, kept)
    if recomputed:
        found = _recomputing(graph, costs, found, recomputed)
        hidden += hidden_again_seconds(graph, costs, recomputed, sum(seconds) - forward)
    in_second = min(hidden, found.backward_weight)
    in_first = min(hidden - in_second, found.backward_input)
    return StageSeconds(forward, found.backward_input - in_first, found.backward_weight - in_second)


def hidden_again_seconds(
    graph: Graph, costs: Sequence[NodeCost], recomputed: Collection[int], ahead: float
) -> float:
    """Of the gathers that backward repeats, seconds that computation hides: the share that it hides
    in forward, of which there is no more.

    Args:
        ahead: seconds of gathers that forward hides.
    """
    gathers = [node for node, size in enumerate(_gathered(graph)) if size]
    total = sum(costs[node].forward_seconds for node in gathers)
    repeated = rerun_nodes(graph, recomputed)
    again = sum(costs[node].forward_seconds for node in gathers if node in repeated)
    return ahead * again / total if total else 0.0


def hidden_sum_seconds(
    graph: Graph,
    weights: Sequence[float],
    network: Network | None,
    kept: Sequence[GradientPart],
) -> float:
    """Of sums of gradients of which ranks keep parts, seconds that computation hides: of those of
    parameters held in parts, and of `kept`.

    Args:
        weights: see `in_weights`.
    """
    gathered, sums = _gathered(graph), _sums_kept(graph, network, kept)
    parts: list[tuple[float, float, float]] = []
    for node in reversed(range(len(weights))):
        whole = gathered[node]
        parts.append((0.0, weights[node], whole) if whole else (weights[node], 0.0, 0.0))
        parts += ((0.0, seconds, size) for seconds, size in sums.get(node, ()))
    waiting = _waiting(graph, network, kept, "reduce_scatter")
    return sum(a + b for a, b, _ in parts) - late_seconds(parts, waiting)


def _waiting(
    graph: Graph, network: Network | None, kept: Sequence[GradientPart], collective: str
) -> float:
    """See `Network.waiting_seconds`, for parameters of `graph` and gradients that are `kept`."""
    if network is None:
        return 0.0
    gathers = (node for node, size in enumerate(_gathered(graph)) if size)
    axes = {str(graph.nodes[node].args[1]) for node in gathers} | {part.axis for part in kept}
    return min((network.waiting_seconds(axis, collective) for axis in axes), default=0.0)


def _sums_kept(
    graph: Graph, network: Network | None, kept: Sequence[GradientPart]
) -> dict[int, list[tuple[float, float]]]:
    """By the node that completes it, seconds and bytes of each sum of `kept`."""
    if network is None or not kept:
        return {}
    by_origin = {value.origin: value for value in graph.values_of(ValueKind.PARAMETER)}
    table: dict[int, list[tuple[float, float]]] = {}
    for part in kept:
        value = by_origin[part.name]
        readers = users(graph)[value.id]
        if part.summed and readers:
            group, size = network.group(part.axis), float(value.type.num_bytes)
            seconds = reduce_scatter_seconds(network.cluster, group, size)
            table.setdefault(readers[0], []).append((seconds, size))
    return table


@once_per_object
def reached_values(graph: Graph) -> frozenset[int]:
    """Boundary inputs that the stage returns gradients of, and what is computed from them."""
    reached = {value.id for value in graph.values_of(ValueKind.BOUNDARY) if value.requires_grad}
    for node in graph.nodes:
        if any(value in reached for value in node.inputs):
            reached.update(node.outputs)
    return frozenset(reached)


def in_weights(graph: Graph, costs: Sequence[NodeCost]) -> list[float]:
    """By node, the seconds of its backward that are in W."""
    reached = reached_values(graph)
    return [
        cost.backward_weight_seconds
        if any(value in reached for value in node.inputs)
        else cost.backward_seconds
        for node, cost in zip(graph.nodes, costs, strict=True)
    ]


def part_shares(
    stage: StageProgram, device_type: DeviceType, network: Network
) -> tuple[float, ...]:
    """How the seconds of W are spread over the parts of `stage`; empty if there are none.

    W runs from the last node to the first, and a part ends with the first reader of the parameters
    whose gradients it completes.
    """
    graph, count = stage.graph, len(stage.parts)
    if not count:
        return ()
    costs = with_reruns(price_once(graph, device_type, network=network), stage.recomputed)
    seconds = in_weights(graph, costs)
    readers = users(graph)
    use_of = {v.origin: readers[v.id][0] for v in graph.values if readers[v.id] and v.origin}
    parts = [0.0] * count
    begin = len(graph.nodes)
    for number, names in enumerate(stage.parts):
        last = number == count - 1
        end = 0 if last else min([begin, *(use_of[name] for name in names if name in use_of)])
        parts[number] = sum(seconds[end:begin])
        begin = end
    total = sum(parts)
    return tuple(part / total if total else 1.0 / count for part in parts)


@once_per_object
def _gathered(graph: Graph) -> tuple[float, ...]:
    """By node, bytes of the parameter that it gathers."""
    return tuple(
        float(graph.values[node.outputs[0]].type.num_bytes)
        if node.op.category is Category.COLLECTIVE
        and node.op.packet == "all_gather"
        and graph.values[node.inputs[0]].kind is ValueKind.PARAMETER
        else 0.0
        for node in graph.nodes
    )


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
    each = moved / max(1, launches)
    cost = device_type.op_cost(optimizer.name, "optimizer", PHASES[0])
    kernels: float = _OPTIMIZER_KERNELS if cost is None else cost.kernels
    rate = device_type.memory_rate(each) if cost is None else device_type.op_rate(cost, each)
    return away + moved / rate + launches * kernels * device_type.overhead_seconds
