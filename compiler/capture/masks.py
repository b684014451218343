"""Recognise attention masks that are constants, and say what they mean.

Under export some models build the causal mask as a tensor where, run eagerly, they would set
`is_causal=True`. A mask that follows from nothing but scalars has one value for good: it is
computed here once. If it equals the lower triangle, attention becomes causal without a mask; if it
lets everything through, the mask is dropped. So fused kernels apply, and no mask is built, stored
or sent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..ir.graph import Attribute, Graph, Node, Operand, producers
from ..ir.ops import Category
from .interpret import execute_node
from .prune import without_dead_code

__all__ = ["simplify_masks"]

_ATTENTION = "aten.scaled_dot_product_attention.default"
_LARGEST_MASK = 1 << 28  # elements computed; a mask of more is left as it is
_SMALL = 1 << 22  # elements that are compared to find what stays the same, as rows of a batch do


def simplify_masks(graph: Graph) -> Graph:
    """The graph with constant masks replaced by what they mean, and nothing computed in vain."""
    constants = _constant_nodes(graph)
    made_by = producers(graph)
    meanings: dict[int, bool | None] = {}
    nodes = list(graph.nodes)
    for node in graph.nodes:
        mask = _mask_of(node)
        if mask is None or made_by.get(node.inputs[mask.index]) not in constants:
            continue
        value = node.inputs[mask.index]
        if value not in meanings:
            meanings[value] = _meaning(graph, value, made_by)
        causal = meanings[value]
        if causal is not None and not (causal and _argument(node, "is_causal", 5, False)):
            nodes[node.id] = _without_mask(node, causal)
    return without_dead_code(replace(graph, nodes=tuple(nodes))) if meanings else graph


def _constant_nodes(graph: Graph) -> frozenset[int]:
    """Nodes that depend on nothing but scalars."""
    made_by = producers(graph)
    found: set[int] = set()
    for node in graph.nodes:
        if node.random_draw is None and all(made_by.get(v) in found for v in node.inputs):
            found.add(node.id)
    return frozenset(found)


def _argument(node: Node, name: str, position: int, default: object) -> object:
    if len(node.args) > position:
        return node.args[position]
    return dict(node.kwargs).get(name, default)


def _mask_of(node: Node) -> Operand | None:
    if node.op.name != _ATTENTION:
        return None
    mask = _argument(node, "attn_mask", 3, None)
    return mask if isinstance(mask, Operand) else None


def _meaning(graph: Graph, value: int, made_by: Mapping[int, int]) -> bool | None:
    """True: the mask is causal; False: it hides nothing; None: neither."""
    shape = graph.values[value].type.shape
    mask = _evaluate(graph, value, made_by) if len(shape) >= 2 else None
    if mask is None:
        return None
    if mask.dtype is not torch.bool:
        lowest = torch.finfo(mask.dtype).min / 2 if mask.is_floating_point() else None
        if lowest is None or not bool(((mask == 0) | (mask <= lowest)).all()):
            return None
        mask = mask == 0
    if bool(mask.all()):
        return False
    if shape[-1] != shape[-2]:
        return None
    triangle = torch.ones(shape[-2:], dtype=torch.bool).tril()
    return True if bool((mask == triangle).all()) else None


def _evaluate(graph: Graph, value: int, made_by: Mapping[int, int]) -> Tensor | None:
    """The tensor that a constant value stands for, of size 1 in dims along which it is known to
    stay the same; None if it is too large to be computed."""
    needed: set[int] = set()
    stack = [made_by[value]]
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            stack.extend(made_by[source] for source in graph.nodes[node].inputs)
    tensors: dict[int, Tensor] = {}
    for number in sorted(needed):
        call = graph.nodes[number]
        shapes = [graph.values[index].type.shape for index in call.inputs]
        inputs = [tensors[source] for source in call.inputs]
        results = [graph.values[index].type.shape for index in call.outputs]
        if call.op.category is Category.ELEMENTWISE and results == [_broadcast(shapes)]:
            made = _broadcast([tensor.shape for tensor in inputs])
        else:
            inputs = [tensor.expand(shape) for tensor, shape in zip(inputs, shapes, strict=True)]
            made = max(results, key=math.prod)
        if math.prod(made) > _LARGEST_MASK and call.op.category is not Category.VIEW:
            return None
        found = map(_narrowed, execute_node(call, inputs, None, torch.device("cpu")))
        tensors.update(zip(call.outputs, found, strict=True))
    return tensors[value]


def _broadcast(shapes: Sequence[Sequence[int]]) -> tuple[int, ...]:
    return tuple(torch.broadcast_shapes(*map(tuple, shapes)))


def _narrowed(tensor: Tensor) -> Tensor:
    """`tensor` of size 1 in the dims along which it stays the same, if it is small or expanded."""
    for dim, size in enumerate(tensor.shape):
        first = tensor.narrow(dim, 0, 1) if size > 1 else tensor
        is_small = tensor.numel() <= _SMALL
        if tensor.stride(dim) == 0 or (is_small and size > 1 and bool((tensor == first).all())):
            tensor = first
    return tensor


def _without_mask(node: Node, causal: bool) -> Node:
    """The attention node without its mask operand, causal if asked for."""
    mask = _mask_of(node)
    assert mask is not None
    args: list[Attribute] = [None if item == mask else item for item in node.args]
    kwargs: dict[str, Attribute] = {name: item for name, item in node.kwargs if item != mask}
    if causal and len(args) > 5:
        args[5] = True
    elif causal:
        kwargs["is_causal"] = True
    return replace(
        node,
        inputs=tuple(v for index, v in enumerate(node.inputs) if index != mask.index),
        args=tuple(_shifted(item, mask.index) for item in args),
        kwargs=tuple((name, _shifted(item, mask.index)) for name, item in kwargs.items()),
    )


def _shifted(item: Attribute, removed: int) -> Attribute:
    """An attribute after operand number `removed` is gone."""
    if isinstance(item, Operand):
        return Operand(item.index - (item.index > removed))
    if isinstance(item, tuple):
        return tuple(_shifted(entry, removed) for entry in item)
    return item
