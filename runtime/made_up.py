"""Values for tensors of a stage that is measured on its own: how long it takes follows from shapes.

Floats are random and neither grow nor vanish through layers. Integers are random where all their
uses say what is legal, as how many rows of a table are looked up counts; else they are zeros.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from ..compiler.ir.graph import Attribute, Graph, Node, Operand, Value, ValueKind
from ..compiler.ir.ops import Category

__all__ = ["index_limits", "made_up"]

_CLASSES = ("cross_entropy_loss", "nll_loss", "nll_loss_nd", "nll_loss2d")
_ALONG = frozenset("index_select gather scatter scatter_add scatter_reduce index_add".split())
_PASSED_ON = ("clone", "contiguous", "to", "_to_copy")  # beside views


def made_up(value: Value, generator: torch.Generator, limits: Mapping[str, int]) -> Tensor:
    """Numbers for `value`; ones for float vectors (variances) and for booleans.

    Args:
        limits: see `index_limits`.
    """
    shape, dtype = value.type.shape, value.type.dtype
    if not value.type.is_float:
        if dtype is torch.bool:
            return torch.ones(shape, dtype=dtype)
        most = min(limits.get(value.name, 1), torch.iinfo(dtype).max)
        return torch.randint(max(1, most), shape, generator=generator).to(dtype)
    if len(shape) < 2 and value.kind is not ValueKind.INPUT:
        return torch.ones(shape, dtype=dtype)
    numbers = torch.randn(shape, generator=generator)
    if value.kind is ValueKind.PARAMETER:
        fan_in = max(1, value.type.numel // max(1, shape[0]))
        numbers *= (2.0 / fan_in) ** 0.5
    return numbers.to(dtype)


def index_limits(graphs: Iterable[Graph]) -> dict[str, int]:
    """Below which number integers may be, by name of value, as all uses of it say.

    Args:
        graphs: of stages, in the order in which they run; a value has one name in all.
    """
    limits: dict[str, int] = {}
    for graph in reversed(tuple(graphs)):
        for node in reversed(graph.nodes):
            for value, limit in _asked(graph, node, limits):
                limits[value.name] = min(limit, limits.get(value.name, limit))
    return limits


def _asked(graph: Graph, node: Node, limits: Mapping[str, int]) -> Iterator[tuple[Value, int]]:
    """What `node` asks of its integer operands, where it asks something."""
    results = [graph.values[index] for index in node.outputs]
    if node.op.category is Category.ELEMENTWISE and results[0].type.dtype is torch.bool:
        return  # a comparison
    known = dict(_indexed(graph, node))
    passes_on = node.op.category is Category.VIEW or node.op.packet in _PASSED_ON
    for index in node.inputs:
        value = graph.values[index]
        if value.type.is_float or value.type.dtype is torch.bool:
            continue
        if passes_on:
            asked = [limits[result.name] for result in results if result.name in limits]
            yield from ((value, limit) for limit in asked)
        else:
            yield value, known.get(index, 1)


def _indexed(graph: Graph, node: Node) -> Iterator[tuple[int, int]]:
    """Operands of `node` that point at places along a dim, and how many there are."""

    def operand(argument: Attribute) -> int | None:
        return node.inputs[argument.index] if isinstance(argument, Operand) else None

    def sized(pointer: Attribute, dim: Attribute) -> Iterator[tuple[int, int]]:
        table, index = operand(node.args[0]), operand(pointer)
        if table is not None and index is not None and isinstance(dim, int):
            yield index, graph.values[table].type.shape[dim]

    packet, count = node.op.packet, len(node.args)
    if packet == "embedding" and count > 1:
        yield from sized(node.args[1], 0)
    elif packet in _CLASSES and count > 1:
        scores = graph.values[node.inputs[0]].type.shape
        yield from sized(node.args[1], min(1, len(scores) - 1))
    elif packet == "index" and count > 1 and isinstance(node.args[1], tuple):
        for dim, pointer in enumerate(node.args[1]):
            yield from sized(pointer, dim)
    elif packet in _ALONG and count > 2:
        yield from sized(node.args[2], node.args[1])
