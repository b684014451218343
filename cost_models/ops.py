"""Roofline price of every op of a graph on a device type, forward and backward.

seconds = max(flops / rate, passes x bytes / memory bandwidth) + kernels x overhead, after Williams,
Waterman and Patterson (Roofline, 2009). Rates may depend on the size of the product, bandwidth on
the bytes that one op moves. Bytes are those of operands and results; views cost nothing. Backward
is the adjoint of each op: one product per operand that requires a gradient. Gradients of values
computed from parameters alone are `backward_weight`, all others `backward_input`; values that
require no gradient have none. Collectives of a rank's local graph are priced by `collectives.py`.
What was measured on the device type corrects all that (`corrections.py`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..compiler.ir.cluster import PHASES, DeviceType
from ..compiler.ir.graph import Graph, Node, Value, ValueKind, users
from ..compiler.ir.memo import once_per_object
from ..compiler.ir.ops import Category
from .analysis import batch_values, weight_like_values
from .collectives import Network, collective_seconds
from .corrections import FactorTable, factors_of, signature_of
from .flops import forward_flops, is_product

__all__ = ["NodeCost", "gradient_sum_seconds", "price", "price_once"]

# Ops that run as several kernels, or whose kernels pass over memory more than once (reordering of
# convolutions on CPU, statistics of norms, hashing of counter-based random numbers): how many
# times the bytes and the overhead count where a device type does not say. Fitted on CPU; compilers
# fuse most of it.
_TYPICAL = {
    Category.CONVOLUTION: (3.0, 4.0),
    Category.NORM: (2.0, 2.0),
    Category.LOSS: (3.0, 3.0),
}
_TYPICAL_BACKWARD = {
    **_TYPICAL,
    # a zero tensor of the operand's size is made, then rows are added to it
    Category.EMBEDDING: (1.0, 2.0),
    Category.INDEXING: (1.0, 2.0),
}
_DRAWING = (16.0, 26.0)
_CURVES = {Category.ATTENTION: "attention", Category.CONVOLUTION: "convolution"}
_PARTS = frozenset("slice select split chunk unbind narrow split_with_sizes unfold".split())


@dataclass(frozen=True, slots=True)
class NodeCost:
    """Predicted seconds of one node on one microbatch."""

    forward_seconds: float
    backward_input_seconds: float
    backward_weight_seconds: float

    @property
    def backward_seconds(self) -> float:
        return self.backward_input_seconds + self.backward_weight_seconds

    @property
    def total_seconds(self) -> float:
        return self.forward_seconds + self.backward_seconds


@dataclass(frozen=True, slots=True)
class _Pricing:
    """What the price of each node of one graph is computed from."""

    graph: Graph
    device_type: DeviceType
    batch_fraction: float
    batched: frozenset[int]
    weights: frozenset[int]
    num_terms: dict[int, int]  # users that return a gradient of a value
    network: Network | None
    ahead: bool

    def num_bytes(self, value: Value) -> float:
        scale = self.batch_fraction if value.id in self.batched else 1.0
        return value.type.num_bytes * scale


def price(
    graph: Graph,
    device_type: DeviceType,
    *,
    batch_fraction: float = 1.0,
    network: Network | None = None,
    batched: frozenset[int] | None = None,
    ahead: bool = False,
) -> tuple[NodeCost, ...]:
    """Predicted cost of every node of `graph`, in node order.

    Args:
        graph: forward graph, captured at a microbatch of b rows.
        device_type: what runs it.
        batch_fraction: price at `b * batch_fraction` rows instead: flops and bytes of values that
            grow with the batch are scaled.
        network: who meets in collectives; needed for a local graph that holds some.
        batched: those values, of a part of a graph that does not tell; None: `batch_values`.
        ahead: of gathers of parameters and sums of their gradients, which travel beside computation
            (`prefetch.py`), count what they take of that where it is known, as planners do.
    """
    carries = [_is_differentiable(graph, node) for node in graph.nodes]
    num_terms = {
        value: sum(carries[node] for node in nodes) for value, nodes in users(graph).items()
    }
    pricing = _Pricing(
        graph=graph,
        device_type=device_type,
        batch_fraction=batch_fraction,
        batched=batch_values(graph) if batched is None else batched,
        weights=weight_like_values(graph),
        num_terms=num_terms,
        network=network,
        ahead=ahead,
    )
    costs = tuple(_node_cost(pricing, node) for node in graph.nodes)
    if device_type.corrections is None:
        return costs
    table = factors_of(device_type.corrections)
    return tuple(
        _corrected(pricing, table, node, cost)
        for node, cost in zip(graph.nodes, costs, strict=True)
    )


def _corrected(pricing: _Pricing, table: FactorTable, node: Node, cost: NodeCost) -> NodeCost:
    """`cost` as measurements correct it; collectives keep theirs, which are the links'."""
    if node.op.category is Category.COLLECTIVE or not cost.total_seconds:
        return cost
    signature = signature_of(
        pricing.graph,
        node,
        batch_fraction=pricing.batch_fraction,
        batched=pricing.batched,
        weights=pricing.weights,
    )
    forward, backward_input, backward_weight = table.factors(signature)
    return NodeCost(
        forward * cost.forward_seconds,
        backward_input * cost.backward_input_seconds,
        backward_weight * cost.backward_weight_seconds,
    )


price_once = once_per_object(price)
"""`price`, for graphs that are asked about again and again."""


def gradient_sum_seconds(device_type: DeviceType, num_bytes: float) -> float:
    """Adding one more term to a gradient of `num_bytes`: two are read, one is written."""
    moved = 3 * num_bytes
    return moved / device_type.memory_rate(moved) + device_type.overhead_seconds


def _is_differentiable(graph: Graph, node: Node) -> bool:
    """Whether a gradient of a result gives one of an operand."""
    values = graph.values
    return any(values[i].requires_grad for i in node.inputs) and any(
        values[i].requires_grad for i in node.outputs
    )


def _node_cost(pricing: _Pricing, node: Node) -> NodeCost:
    if not node.outputs:
        return NodeCost(0.0, 0.0, 0.0)
    values = pricing.graph.values
    wanted = [values[i] for i in node.inputs if values[i].requires_grad]
    differentiable = _is_differentiable(pricing.graph, node)
    if node.op.category is Category.COLLECTIVE:
        return _collective_cost(pricing, node, differentiable)
    if node.op.category is Category.VIEW:
        backward = _view_adjoint_seconds(pricing, node, wanted) if differentiable else 0.0
        return NodeCost(0.0, backward, 0.0)
    scaled = any(index in pricing.batched for index in (*node.inputs, *node.outputs))
    flops = forward_flops(pricing.graph, node) * (pricing.batch_fraction if scaled else 1.0)
    forward = _seconds(pricing, node, flops, _forward_bytes(pricing, node))
    if not differentiable:
        return NodeCost(forward, 0.0, 0.0)
    backward_by_kind = {True: 0.0, False: 0.0}
    arriving = sum(pricing.num_bytes(values[i]) for i in node.outputs if values[i].requires_grad)
    for is_weight in (False, True):
        group = [value for value in wanted if (value.id in pricing.weights) is is_weight]
        if group:
            phase = PHASES[1 + is_weight]
            seconds = _adjoint_seconds(pricing, node, group, flops, arriving, phase)
            backward_by_kind[is_weight] = seconds + _summing_seconds(pricing, group)
    return NodeCost(forward, backward_by_kind[False], backward_by_kind[True])


def _collective_cost(pricing: _Pricing, node: Node, differentiable: bool) -> NodeCost:
    assert pricing.network is not None, f"{node.name}: a collective needs a network to be priced"
    operand, result = (pricing.graph.values[i] for i in (node.inputs[0], node.outputs[0]))
    forward, backward = collective_seconds(
        pricing.network,
        pricing.device_type,
        node,
        operand_bytes=pricing.num_bytes(operand),
        result_bytes=pricing.num_bytes(result),
        ahead=pricing.ahead and operand.kind is ValueKind.PARAMETER,
    )
    if not differentiable:
        return NodeCost(forward, 0.0, 0.0)
    backward += _summing_seconds(pricing, [operand])
    if operand.id in pricing.weights:
        return NodeCost(forward, 0.0, backward)
    return NodeCost(forward, backward, 0.0)


def _view_adjoint_seconds(pricing: _Pricing, node: Node, wanted: list[Value]) -> float:
    """The gradient of a view is a view; that of a part is zeros of the whole, part filled in."""
    seconds = _summing_seconds(pricing, wanted)
    if node.op.packet in _PARTS:
        size = sum(pricing.num_bytes(value) for value in wanted)
        seconds += size / pricing.device_type.memory_rate(size) + _overhead(pricing)
    return seconds


def _summing_seconds(pricing: _Pricing, group: list[Value]) -> float:
    """Share of this user in adding up the gradients of operands with several users."""
    seconds = 0.0
    for value in group:
        count = pricing.num_terms[value.id]
        if count > 1:
            term = gradient_sum_seconds(pricing.device_type, pricing.num_bytes(value))
            seconds += term * (count - 1) / count
    return seconds


def _forward_bytes(pricing: _Pricing, node: Node) -> float:
    values = pricing.graph.values
    written = sum(pricing.num_bytes(values[index]) for index in node.outputs)
    if node.op.category is Category.FACTORY:
        return written
    if node.op.category is Category.EMBEDDING or _gathers(node):
        others = (pricing.num_bytes(values[index]) for index in node.inputs[1:])
        return 2.0 * written + sum(others)  # only the rows that are looked up are read
    return written + sum(pricing.num_bytes(values[index]) for index in node.inputs)


def _gathers(node: Node) -> bool:
    return node.op.packet in ("index", "index_select", "gather", "take_along_dim")


def _adjoint_seconds(
    pricing: _Pricing, node: Node, group: list[Value], flops: float, arriving: float, phase: str
) -> float:
    """Seconds of the gradients of the operands `group` of `node`, which belong to `phase`.

    A product's adjoint reads the arriving gradient and the other operand and writes the operand's
    gradient, at the forward's flops per matrix operand (a bias is a sum). Attention computes the
    scores again: 2.5 times the forward for its three gradients. Everything else reads the
    arriving gradient and what was saved (about the operands) once and writes once, in one kernel
    for all operands.
    """
    values = pricing.graph.values
    written = sum(pricing.num_bytes(value) for value in group)
    if node.op.category is Category.ATTENTION:
        operands = sum(pricing.num_bytes(values[index]) for index in node.inputs)
        moved = operands + 2 * arriving + written
        return _seconds(pricing, node, 2.5 * flops, moved, phase)
    if is_product(node):
        seconds = 0.0
        for value in group:
            matrix = len(value.type.shape) > 1
            others = sum(
                pricing.num_bytes(values[index])
                for index in node.inputs
                if index != value.id and matrix
            )
            moved = arriving + others + pricing.num_bytes(value)
            seconds += _seconds(pricing, node, flops if matrix else 0.0, moved, phase)
        return seconds
    if node.op.category in (Category.EMBEDDING, Category.INDEXING):
        return _seconds(pricing, node, flops, written + 2 * arriving, phase)
    reads = arriving if node.op.category is Category.COPY else arriving + written
    return _seconds(pricing, node, 2 * flops, reads + written, phase)


def _seconds(
    pricing: _Pricing, node: Node, flops: float, moved: float, phase: str = PHASES[0]
) -> float:
    """Seconds of one op or of gradients of it; forward may draw random numbers on the way."""
    device = pricing.device_type
    dtype = pricing.graph.values[node.outputs[0]].type.dtype
    seconds = 0.0
    if phase == PHASES[0] and node.random_draw is not None:
        moved += _score_bytes(pricing, node)
        seconds = _drawing_seconds(device, moved, dtype)
    cost = device.op_cost(node.op.packet, node.op.category.value, phase, dtype)
    if cost is not None:
        moving, kernels = moved / device.op_rate(cost, moved), cost.kernels
    else:
        typical = _TYPICAL if phase == PHASES[0] else _TYPICAL_BACKWARD
        passes, kernels = typical.get(node.op.category, (1.0, 1.0))
        moving = passes * moved / device.memory_rate(moved)
    size = flops if is_product(node) else math.inf
    rate = device.rate(dtype, size, _CURVES.get(node.op.category, "matmul"))
    return seconds + max(flops / rate, moving) + kernels * device.overhead_seconds


def _drawing_seconds(device: DeviceType, moved: float, dtype: torch.dtype) -> float:
    """Of random numbers for an op in `dtype` that moves `moved` bytes."""
    cost = device.op_cost("random", "random", PHASES[0], dtype)
    if cost is not None:
        return moved / device.op_rate(cost, moved) + cost.kernels * device.overhead_seconds
    passes, kernels = _DRAWING
    return passes * moved / device.memory_rate(moved) + kernels * device.overhead_seconds


def _score_bytes(pricing: _Pricing, node: Node) -> float:
    """Attention with dropout holds its score matrices, one number per query and key row."""
    if node.op.category is not Category.ATTENTION:
        return 0.0
    query, key = (pricing.graph.values[index] for index in (node.inputs[0], node.inputs[1]))
    return pricing.num_bytes(query) / query.type.shape[-1] * key.type.shape[-2]


def _overhead(pricing: _Pricing) -> float:
    return pricing.device_type.overhead_seconds
