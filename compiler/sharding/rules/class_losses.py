"""Rules of losses over classes: cross entropy of logits, and of log-probabilities (`nll_loss`).

Over rows each rank sums the losses of its rows and divides by what *all* ranks count: the rows that
are not ignored, or the class weights of their targets. Over classes each rank holds a slice of the
vocabulary and the logits are never gathered: what crosses the ranks is one maximum, one sum of
exponentials and the target's logit of every row (as in Megatron-LM: Shoeybi et al., 2019).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from ...ir.mesh import Replicate, Shard
from ...ir.types import TensorType
from ..emit import cast, detached, elementwise, narrowed, reduced, widened
from ..labels import along_labels, call_with, integer
from ..lowering import Lowering, Ref
from ..rule import Rule, Table
from ..strategy import OpStrategy, OpView, can_shard
from .losses import MEAN, NONE, SUM

__all__ = ["CLASS_LOSSES"]


def _class_dim(view: OpView) -> int:
    return 1 if len(_logits(view).shape) > 1 else 0


def _logits(view: OpView) -> TensorType:
    return view.input(_position(view, "self"))


def _position(view: OpView, name: str) -> int:
    position = view.operand(name)
    assert position is not None
    return position


def _has_indices(view: OpView) -> bool:
    """Whether targets are class numbers, not probabilities."""
    return not view.input(_position(view, "target")).is_float


def _smoothing(view: OpView) -> float:
    value = view.argument("label_smoothing", 0.0)
    assert isinstance(value, (int, float))
    return float(value)


def _classes(view: OpView, parts: int) -> Iterator[OpStrategy]:
    logits, target = _position(view, "self"), _position(view, "target")
    weight = view.operand("weight")
    if weight is not None and view.graph.values[view.node.inputs[weight]].requires_grad:
        return
    dim, rank = _class_dim(view), len(_logits(view).shape)
    labels = ["" if at == dim else f"d{at}" for at in range(rank)]
    rows = [label for label in labels if label]
    targets = rows if _has_indices(view) else labels
    result = rows if view.argument("reduction") == NONE else []
    operands = [(logits, labels), (target, targets), (weight, [""])]
    yield from along_labels(view, parts, operands, [result])
    simple = _has_indices(view) and not (weight is not None and _smoothing(view))
    if simple and can_shard(_logits(view), dim, parts):
        inputs = [Shard(dim) if at == logits else Replicate() for at in range(len(view.inputs))]
        yield OpStrategy(tuple(inputs), (Replicate(),))


def _row_axes(lowering: Lowering) -> tuple[int, ...]:
    dim, layout = (
        _class_dim(lowering.view),
        lowering.input_layouts[_position(lowering.view, "self")],
    )
    sharded = lowering.axes_with(Shard, layout)
    return tuple(axis for axis in sharded if layout.placements[axis] != Shard(dim))


def _class_axes(lowering: Lowering) -> tuple[int, ...]:
    layout = lowering.input_layouts[_position(lowering.view, "self")]
    return lowering.axes_sharding(layout, _class_dim(lowering.view))


def _lower(lowering: Lowering) -> Sequence[Ref]:
    view = lowering.view
    reduction, rows = view.argument("reduction"), _row_axes(lowering)
    if _class_axes(lowering):
        losses = _row_losses(lowering)
        if reduction == NONE:
            return (narrowed(lowering, losses),)
        every = range(len(lowering.type(losses).shape))
        total = reduced(lowering, "sum.dim_IntList", losses, tuple(every))
    elif reduction == MEAN and rows:
        logits = widened(lowering, lowering.inputs[_position(view, "self")])
        (total,) = _summed(lowering, logits)
    else:
        return lowering.same()
    if reduction == MEAN:
        total = elementwise(lowering, "div.Tensor", total, _count(lowering))
    return (narrowed(lowering, total),)


def _summed(lowering: Lowering, logits: Ref) -> tuple[Ref, ...]:
    """The operator itself, with the sum for the mean and in the precision of sums."""
    if lowering.type(logits).dtype == lowering.output_type().dtype:
        return call_with(lowering, {"self": logits, "reduction": SUM})
    target = lowering.inputs[_position(lowering.view, "target")]
    weight = _weight(lowering)
    rest = [lowering.view.argument("ignore_index")]
    if lowering.node.op.packet == "cross_entropy_loss":
        rest.append(_smoothing(lowering.view))
    result = TensorType((), lowering.type(logits).dtype)
    return (lowering.emit(lowering.node.op.name, (logits, target, weight, SUM, *rest), result),)


def _weight(lowering: Lowering) -> Ref | None:
    """The class weights, in the precision of sums."""
    position = lowering.view.operand("weight")
    return None if position is None else widened(lowering, lowering.inputs[position])


def _kept(lowering: Lowering) -> Ref:
    """Which rows are not ignored."""
    target = lowering.inputs[_position(lowering.view, "target")]
    ignored = integer(lowering.view.argument("ignore_index"))
    return elementwise(lowering, "ne.Scalar", target, ignored, dtype=torch.bool)


def _row_weights(lowering: Lowering) -> Ref:
    """The class weight of each row's target, zero for ignored rows."""
    weight, kept = _weight(lowering), _kept(lowering)
    assert weight is not None
    target = lowering.inputs[_position(lowering.view, "target")]
    ignored = elementwise(lowering, "logical_not.default", kept)
    inside = elementwise(lowering, "masked_fill.Scalar", target, ignored, 0)
    type = TensorType(lowering.type(target).shape, lowering.type(weight).dtype)
    chosen = lowering.emit("aten.index.Tensor", (weight, (inside,)), type)
    return elementwise(lowering, "masked_fill.Scalar", chosen, ignored, 0.0)


def _count(lowering: Lowering) -> Ref | float:
    """What the mean divides by: rows or weights of all ranks."""
    view, axes = lowering.view, _row_axes(lowering)
    if not _has_indices(view):
        logits = _logits(view)
        return logits.numel / logits.shape[_class_dim(view)]
    weighted = view.operand("weight") is not None
    counted = _row_weights(lowering) if weighted else _kept(lowering)
    every = tuple(range(len(lowering.type(counted).shape)))
    total = reduced(lowering, "sum.dim_IntList", counted, every)
    for axis in axes:
        total = lowering.all_reduce(total, axis)
    if weighted:
        return total
    wide = torch.float64 if lowering.output_type().dtype == torch.float64 else torch.float32
    return cast(lowering, total, wide)


# -- classes over ranks ----------------------------------------------------------------------------


def _row_losses(lowering: Lowering) -> Ref:
    """Loss of each row, the classes being spread over ranks; the same on all of them."""
    view = lowering.view
    x = widened(lowering, lowering.inputs[_position(view, "self")])
    picked = _picked(lowering, x)
    smoothing = _smoothing(view)
    if lowering.node.op.packet != "cross_entropy_loss":
        losses = elementwise(lowering, "neg.default", picked)
    else:
        normalizer = _log_sum_exp(lowering, x)
        losses = elementwise(lowering, "sub.Tensor", normalizer, picked)
        if smoothing:
            mean = _total(lowering, reduced(lowering, "sum.dim_IntList", x, (_class_dim(view),)))
            mean = elementwise(lowering, "div.Tensor", mean, _logits(view).shape[_class_dim(view)])
            spread = elementwise(lowering, "sub.Tensor", normalizer, mean)
            losses = elementwise(lowering, "mul.Tensor", losses, 1.0 - smoothing)
            spread = elementwise(lowering, "mul.Tensor", spread, smoothing)
            losses = elementwise(lowering, "add.Tensor", losses, spread)
    if view.operand("weight") is not None:
        return elementwise(lowering, "mul.Tensor", losses, _row_weights(lowering))
    ignored = elementwise(lowering, "logical_not.default", _kept(lowering))
    return elementwise(lowering, "masked_fill.Scalar", losses, ignored, 0.0)


def _total(lowering: Lowering, ref: Ref) -> Ref:
    for axis in _class_axes(lowering):
        ref = lowering.all_reduce(ref, axis)
    return ref


def _log_sum_exp(lowering: Lowering, x: Ref) -> Ref:
    """Over the classes of all ranks. The maximum cancels, so it needs no gradient."""
    dim = _class_dim(lowering.view)
    top = reduced(lowering, "amax.default", detached(lowering, x), (dim,), keepdim=True)
    for axis in _class_axes(lowering):
        top = lowering.all_reduce(top, axis, "max")
    powers = elementwise(lowering, "exp.default", elementwise(lowering, "sub.Tensor", x, top))
    total = _total(lowering, reduced(lowering, "sum.dim_IntList", powers, (dim,)))
    shape = lowering.type(total).shape
    top = lowering.emit("aten.squeeze.dim", (top, dim), TensorType(shape, lowering.type(top).dtype))
    return elementwise(lowering, "add.Tensor", elementwise(lowering, "log.default", total), top)


def _picked(lowering: Lowering, x: Ref) -> Ref:
    """The entry of each row at its target: one rank has it, the others add zero."""
    view, dim = lowering.view, _class_dim(lowering.view)
    position = _position(view, "self")
    start, size = lowering.input_start(position, dim), lowering.type(x).shape[dim]
    target = lowering.inputs[_position(view, "target")]
    shifted = elementwise(lowering, "sub.Tensor", target, start)
    below = elementwise(lowering, "lt.Scalar", shifted, 0, dtype=torch.bool)
    above = elementwise(lowering, "ge.Scalar", shifted, size, dtype=torch.bool)
    outside = elementwise(lowering, "logical_or.default", below, above)
    index = elementwise(lowering, "masked_fill.Scalar", shifted, outside, 0)
    rows = lowering.type(index).shape
    column = (*rows[:dim], 1, *rows[dim:])
    index = lowering.emit("aten.unsqueeze.default", (index, dim), TensorType(column, torch.int64))
    type = lowering.type(x)
    chosen = lowering.emit("aten.gather.default", (x, dim, index), TensorType(column, type.dtype))
    chosen = lowering.emit("aten.squeeze.dim", (chosen, dim), TensorType(rows, type.dtype))
    return _total(lowering, elementwise(lowering, "masked_fill.Scalar", chosen, outside, 0.0))


CLASS_LOSSES: Table = {
    packet: Rule(_classes, _lower) for packet in ("cross_entropy_loss", "nll_loss_nd")
}
