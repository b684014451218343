"""Random operators that draw a window of a whole tensor's numbers, by drawing the whole.

The plain meaning of the `window` argument: slow, and independent of the counter arithmetic of the
runtime.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from cutset.compiler.ir.graph import Node, Operand
from cutset.compiler.ir.ops import resolve
from cutset.runtime.rng import random_op

__all__ = ["execute_window"]


def execute_window(node: Node, inputs: list[Tensor], key: Tensor) -> Tensor:
    """Result of a node with `window=(global shape, offset)`, both of what the node draws."""
    assert node.random_draw is not None
    arguments: dict[str, Any] = {}
    names = [item.name for item in resolve(node.op)._schema.arguments]
    for name, item in [*zip(names, node.args, strict=False), *node.kwargs]:
        arguments[name] = inputs[item.index] if isinstance(item, Operand) else item
    shape, offset = arguments.pop("window")
    if node.op.packet == "dropout":
        x, p = arguments["input"], arguments["p"]
        return x * _window(_mask(key, node.random_draw, shape, p), offset, x.shape).to(x.dtype)
    if node.op.packet == "scaled_dot_product_attention":
        return _attention(key, node.random_draw, shape, offset, **arguments)
    # a factory: `size` is the local one
    local = arguments.pop("size") if "size" in arguments else arguments.pop("self").shape
    name = node.op.name.replace("_like", "")
    whole = random_op(name)(key, node.random_draw, list(shape), **arguments)
    assert isinstance(whole, Tensor)
    return _window(whole, offset, local)


def _mask(key: Tensor, draw: int, shape: tuple[int, ...], p: float) -> Tensor:
    ones = torch.ones(shape, dtype=torch.float64)
    mask = random_op("aten.dropout.default")(key, draw, ones, p, True)
    assert isinstance(mask, Tensor)
    return mask


def _window(whole: Tensor, offset: tuple[int, ...], shape: Any) -> Tensor:
    assert len(offset) == len(shape) == whole.ndim
    for dim, (start, size) in enumerate(zip(offset, shape, strict=True)):
        whole = whole.narrow(dim, start, size)
    return whole


def _attention(
    seed: Tensor,
    draw: int,
    shape: tuple[int, ...],
    offset: tuple[int, ...],
    *,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    scores = query @ key.mT * (1.0 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:]).tril().bool(), -math.inf)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    keep = _window(_mask(seed, draw, shape, dropout_p), offset, scores.shape)
    return torch.softmax(scores, -1) * keep.to(scores.dtype) @ value
