"""Rules of normalizations.

Batch normalization over the batch uses the statistics of all ranks: otherwise a data-parallel model
would not be the model that the user wrote.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ...ir.mesh import Placement, Replicate, Shard
from ..emit import cast, detached, elementwise, narrowed, reduced, viewed, widened
from ..labels import Labelled, Labels, along_labels, call_with, integer
from ..lowering import Lowering, Ref
from ..rule import Rule, Table
from ..strategy import OpStrategy, OpView, can_shard

__all__ = ["NORMS"]


def _layer(view: OpView, parts: int) -> Iterator[OpStrategy]:
    """Over the dims that are not normalized."""
    shape = view.argument("normalized_shape")
    assert isinstance(shape, tuple)
    x = view.operand("input")
    assert x is not None
    rank = len(view.input(x).shape)
    labels = [f"d{dim}" if dim < rank - len(shape) else "" for dim in range(rank)]
    fixed = [""] * len(shape)
    operands = [(x, labels), *((view.operand(name), fixed) for name in ("weight", "bias"))]
    return along_labels(view, parts, operands, [labels] * len(view.outputs))


def _channelwise(view: OpView, label: str) -> tuple[list[Labelled], Labels]:
    """Labels `n` and `label` for an operator on `[n, channels, ...]` and those of its result."""
    x = view.operand("input")
    assert x is not None
    labels = ["n", label, *[""] * (len(view.input(x).shape) - 2)]
    names = ("weight", "bias", "running_mean", "running_var")
    return [(x, labels), *((view.operand(name), [label]) for name in names)], labels


def _group(view: OpView, parts: int) -> Iterator[OpStrategy]:
    """Over the batch, and over channels where every rank gets whole groups."""
    groups = integer(view.argument("num_groups"))
    operands, result = _channelwise(view, "c" if groups % parts == 0 else "")
    return along_labels(view, parts, operands, [result])


def _lower_group(lowering: Lowering) -> Sequence[Ref]:
    groups = integer(lowering.view.argument("num_groups"))
    channels = lowering.view.output().shape[1]
    local = lowering.output_type().shape[1] * groups // channels
    return call_with(lowering, {"num_groups": local})


def _instance(view: OpView, parts: int) -> Iterator[OpStrategy]:
    if view.operand("running_mean") is not None:
        return iter(())  # updated in place
    operands, result = _channelwise(view, "c")
    return along_labels(view, parts, operands, [result])


# -- batch normalization ---------------------------------------------------------------------------


def _is_training(view: OpView) -> bool:
    return bool(view.argument("training", False))


def _batch(view: OpView, parts: int) -> Iterator[OpStrategy]:
    """Over channels, and over any other dim with statistics of the whole."""
    stats = view.operand("running_mean")
    in_place = _is_training(view) and not view.packet.endswith("functional")
    if in_place and stats is not None:
        return
    operands, result = _channelwise(view, "c")
    result = ["", *result[1:]]
    operands[0] = (operands[0][0], result)
    # statistics that evaluation does not make are returned empty
    saved = [["c" if type.numel else ""] for type in view.outputs[1:]]
    yield from along_labels(view, parts, operands, [result, *saved])
    x = operands[0][0]
    assert x is not None
    rest: tuple[Placement, ...] = (Replicate(),) * (len(view.outputs) - 1)
    for dim in range(len(result)):
        if dim != 1 and can_shard(view.input(x), dim, parts):
            inputs: list[Placement] = [Replicate()] * len(view.inputs)
            inputs[x] = Shard(dim)
            yield OpStrategy(tuple(inputs), (Shard(dim), *rest))


def _lower_batch(lowering: Lowering) -> Sequence[Ref]:
    layout = lowering.output_layouts[0]
    axes = [
        axis for axis in lowering.axes_with(Shard, layout) if layout.placements[axis] != Shard(1)
    ]
    if not axes or not _is_training(lowering.view):
        return lowering.same()
    centred, mean, variance = _moments(lowering, axes)
    inverse = elementwise(lowering, "add.Tensor", variance, _number(lowering, "eps"))
    inverse = elementwise(lowering, "rsqrt.default", inverse)
    scale = inverse
    for axis in axes:
        scale = lowering.sum_gradient(scale, axis)
    result = elementwise(lowering, "mul.Tensor", centred, scale)
    for name, op in (("weight", "mul.Tensor"), ("bias", "add.Tensor")):
        position = lowering.view.operand(name)
        if position is not None:
            factor = widened(lowering, lowering.inputs[position])
            factor = viewed(lowering, factor, lowering.type(mean).shape)
            result = elementwise(lowering, op, result, factor)
    extra = _statistics(lowering, mean, variance, inverse)
    return (narrowed(lowering, result), *extra)


def _number(lowering: Lowering, name: str) -> float:
    value = lowering.view.argument(name)
    assert isinstance(value, (int, float))
    return float(value)


def _count(lowering: Lowering) -> int:
    """Elements of one channel on all ranks."""
    shape = lowering.view.output().shape
    return lowering.view.output().numel // shape[1]


def _moments(lowering: Lowering, axes: Sequence[int]) -> tuple[Ref, Ref, Ref]:
    """The own part less the mean of all parts; mean and (biased) variance of all parts.

    In two passes, so that nothing cancels. A statistic is the same on all ranks and used by each
    on its part: hence a sum forward, and one of its gradient's terms backward.
    """
    position = lowering.view.operand("input")
    assert position is not None
    x = widened(lowering, lowering.inputs[position])
    dims = [dim for dim in range(len(lowering.type(x).shape)) if dim != 1]
    mean = _mean(lowering, x, dims, axes)
    used = mean
    for axis in axes:
        used = lowering.sum_gradient(used, axis)
    centred = elementwise(lowering, "sub.Tensor", x, used)
    squares = elementwise(lowering, "mul.Tensor", centred, centred)
    return centred, mean, _mean(lowering, squares, dims, axes)


def _mean(lowering: Lowering, ref: Ref, dims: Sequence[int], axes: Sequence[int]) -> Ref:
    total = reduced(lowering, "sum.dim_IntList", ref, dims, keepdim=True)
    for axis in axes:
        total = lowering.all_reduce(total, axis)
    return elementwise(lowering, "div.Tensor", total, _count(lowering))


def _statistics(lowering: Lowering, mean: Ref, variance: Ref, inverse: Ref) -> list[Ref]:
    """The results after the first: saved mean and inverse deviation, new running statistics."""
    wanted = len(lowering.node.outputs) - 1
    channels = (lowering.type(mean).numel,)
    flat = [
        viewed(lowering, detached(lowering, ref), channels) for ref in (mean, inverse, variance)
    ]
    found = [cast(lowering, ref, lowering.output_type(1).dtype) for ref in flat[:2][:wanted]]
    if wanted > 2:
        count = _count(lowering)
        unbiased = elementwise(lowering, "mul.Tensor", flat[2], count / max(count - 1, 1))
        found.append(_running(lowering, "running_mean", flat[0]))
        found.append(_running(lowering, "running_var", unbiased))
    return found


def _running(lowering: Lowering, name: str, observed: Ref) -> Ref:
    position, momentum = lowering.view.operand(name), _number(lowering, "momentum")
    assert position is not None
    old = lowering.inputs[position]
    observed = cast(lowering, observed, lowering.type(old).dtype)
    kept = elementwise(lowering, "mul.Tensor", old, 1.0 - momentum)
    return elementwise(
        lowering, "add.Tensor", kept, elementwise(lowering, "mul.Tensor", observed, momentum)
    )


NORMS: Table = {
    **{packet: Rule(_layer) for packet in ("layer_norm", "native_layer_norm", "rms_norm")},
    **{
        packet: Rule(_batch, _lower_batch)
        for packet in (
            "batch_norm",
            "_native_batch_norm_legit",
            "_native_batch_norm_legit_functional",
            "_native_batch_norm_legit_no_training",
        )
    },
    "group_norm": Rule(_group, _lower_group),
    "instance_norm": Rule(_instance),
}
