"""Roofline price of every op of a graph on a device type, forward and backward.

seconds = max(flops / rate, bytes / memory bandwidth) + overhead, after Williams, Waterman and
Patterson (Roofline, 2009). Bytes are those of operands and results; views cost nothing. Backward
is the adjoint of each op: one product per operand that requires a gradient. Gradients of values
computed from parameters alone are `backward_weight`, all others `backward_input`; values that
require no gradient have none.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..compiler.ir.cluster import DeviceType
from ..compiler.ir.graph import Graph, Node, Value
from ..compiler.ir.ops import Category
from .analysis import batch_values, weight_like_values
from .flops import forward_flops, is_product

__all__ = ["NodeCost", "price"]

# Passes over the bytes of its operands that an op's kernel makes where it is not one.
_RANDOM_PASSES = 12.0  # counter-based hashing in integer ops instead of one kernel
_FREE = (Category.VIEW,)


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

    def num_bytes(self, value: Value) -> float:
        scale = self.batch_fraction if value.id in self.batched else 1.0
        return value.type.num_bytes * scale


def price(
    graph: Graph, device_type: DeviceType, *, batch_fraction: float = 1.0
) -> tuple[NodeCost, ...]:
    """Predicted cost of every node of `graph`, in node order.

    Args:
        graph: forward graph, captured at a microbatch of b rows.
        device_type: what runs it.
        batch_fraction: price at `b * batch_fraction` rows instead: flops and bytes of values that
            grow with the batch are scaled.
    """
    pricing = _Pricing(
        graph, device_type, batch_fraction, batch_values(graph), weight_like_values(graph)
    )
    return tuple(_node_cost(pricing, node) for node in graph.nodes)


def _node_cost(pricing: _Pricing, node: Node) -> NodeCost:
    if node.op.category in _FREE or not node.outputs:
        return NodeCost(0.0, 0.0, 0.0)
    values = pricing.graph.values
    scaled = any(index in pricing.batched for index in (*node.inputs, *node.outputs))
    flops = forward_flops(pricing.graph, node) * (pricing.batch_fraction if scaled else 1.0)
    moved = _forward_bytes(pricing, node)
    forward = _seconds(pricing, node, flops, moved * (_RANDOM_PASSES if node.op.random else 1.0))
    wanted = [values[i] for i in node.inputs if values[i].requires_grad]
    if not wanted or not any(values[i].requires_grad for i in node.outputs):
        return NodeCost(forward, 0.0, 0.0)
    backward = {True: 0.0, False: 0.0}
    arriving = sum(pricing.num_bytes(values[i]) for i in node.outputs if values[i].requires_grad)
    for is_weight in (False, True):
        group = [value for value in wanted if (value.id in pricing.weights) is is_weight]
        if group:
            backward[is_weight] = _adjoint_seconds(pricing, node, group, flops, arriving)
    return NodeCost(forward, backward[False], backward[True])


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
    pricing: _Pricing, node: Node, group: list[Value], flops: float, arriving: float
) -> float:
    """Seconds of the gradients of the operands `group` of `node`.

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
        return _seconds(pricing, node, 2.5 * flops, operands + 2 * arriving + written)
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
            seconds += _seconds(pricing, node, flops if matrix else 0.0, moved)
        return seconds
    if node.op.category in (Category.EMBEDDING, Category.INDEXING):
        # the gradient is a zero tensor of the operand's size, then rows are added to it
        return _seconds(pricing, node, flops, written + 2 * arriving) + _overhead(pricing)
    reads = arriving if node.op.category is Category.COPY else arriving + written
    return _seconds(pricing, node, 2 * flops, reads + written)


def _seconds(pricing: _Pricing, node: Node, flops: float, moved: float) -> float:
    device = pricing.device_type
    dtype = pricing.graph.values[node.outputs[0]].type.dtype
    return (
        max(flops / device.rate(dtype), moved / device.memory_bytes_per_second)
        + device.overhead_seconds
    )


def _overhead(pricing: _Pricing) -> float:
    return pricing.device_type.overhead_seconds
