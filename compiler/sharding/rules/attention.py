"""Rules of attention and of embedding tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from ...ir.mesh import Partial, Placement, Replicate, Shard
from ...ir.types import TensorType
from ..emit import elementwise
from ..labels import Labelled, aligned, along_labels, call_with, integer
from ..lowering import Lowering, Ref
from ..rule import Rule, Table
from ..strategy import OpStrategy, OpView, can_shard

__all__ = ["ATTENTION"]


def _attention(view: OpView, parts: int) -> Iterator[OpStrategy]:
    """Over batch dims, heads, and rows of queries where no row is masked by its number.

    Grouped queries: a rank gets whole groups, the heads of keys and values that its queries use.
    """
    query = view.operand("query")
    assert query is not None
    lead = [f"batch{dim}" for dim in range(len(view.input(query).shape) - 2)]
    rows = "" if view.argument("is_causal") else "q"
    operands: list[Labelled] = [
        (query, [*lead, rows, ""]),
        (view.operand("key"), [*lead, "", ""]),
        (view.operand("value"), [*lead, "", ""]),
    ]
    mask = view.operand("attn_mask")
    if mask is not None:
        operands.append((mask, aligned(view.input(mask), [*lead, rows, ""])))
    return along_labels(view, parts, operands, [[*lead, rows, ""]])


def _lower_attention(lowering: Lowering) -> Sequence[Ref]:
    """With dropout, the part of the whole score tensor's mask: `[..., queries, keys]`."""
    layout, view = lowering.output_layouts[0], lowering.view
    if lowering.node.random_draw is None or not lowering.axes_with(Shard, layout):
        return lowering.same()
    key = view.operand("key")
    assert key is not None
    shape = (*view.output().shape[:-1], view.input(key).shape[-2])
    window = (shape, (*lowering.output_offset()[:-1], 0))
    return call_with(lowering, {"window": window})


# -- embedding -------------------------------------------------------------------------------------


def _embedding(view: OpView, parts: int) -> Iterator[OpStrategy]:
    """Over the dims of the ids, over columns of the table, and over its rows (the vocabulary)."""
    if view.argument("scale_grad_by_freq") or view.argument("sparse"):
        return  # gradients that count ids, or are no dense tensors
    weight, ids = view.operand("weight"), view.operand("indices")
    assert weight is not None and ids is not None
    rows = [f"d{dim}" for dim in range(len(view.input(ids).shape))]
    yield from along_labels(
        view, parts, [(weight, ["", "columns"]), (ids, rows)], [[*rows, "columns"]]
    )
    if can_shard(view.input(weight), 0, parts):
        inputs: list[Placement] = [Replicate()] * 2
        inputs[weight] = Shard(0)
        yield OpStrategy(tuple(inputs), (Partial(),))


def _lower_embedding(lowering: Lowering) -> Sequence[Ref]:
    """Over the vocabulary a rank looks up the ids that it has; the other rows are zeros.

    (Megatron-LM's vocabulary-parallel embedding: Shoeybi et al., 2019.)
    """
    view = lowering.view
    position, ids = view.operand("weight"), view.operand("indices")
    assert position is not None and ids is not None
    if not lowering.axes_sharding(lowering.input_layouts[position], 0):
        return lowering.same()
    start = lowering.input_start(position, 0)
    size = lowering.type(lowering.inputs[position]).shape[0]
    shifted = elementwise(lowering, "sub.Tensor", lowering.inputs[ids], start)
    below = elementwise(lowering, "lt.Scalar", shifted, 0, dtype=torch.bool)
    above = elementwise(lowering, "ge.Scalar", shifted, size, dtype=torch.bool)
    outside = elementwise(lowering, "logical_or.default", below, above)
    inside = elementwise(lowering, "masked_fill.Scalar", shifted, outside, 0)
    padding = integer(view.argument("padding_idx")) - start
    (rows,) = call_with(
        lowering,
        {"indices": inside, "padding_idx": padding if 0 <= padding < size else -1},
    )
    column = TensorType((*lowering.type(outside).shape, 1), torch.bool)
    hidden = lowering.emit("aten.unsqueeze.default", (outside, -1), column)
    return (elementwise(lowering, "masked_fill.Scalar", rows, hidden, 0.0),)


ATTENTION: Table = {
    "embedding": Rule(_embedding, _lower_embedding),
    "scaled_dot_product_attention": Rule(_attention, _lower_attention),
}
