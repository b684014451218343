"""Rules of convolution, pooling, resampling and padding: over batch and channels, not in space."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..labels import Labelled, added_once, along_labels, call_with, integer
from ..lowering import Lowering, Ref
from ..rule import Rule, Table
from ..strategy import OpStrategy, OpView, StrategyRule

__all__ = ["CONVOLUTIONS"]


def _convolution(view: OpView, parts: int) -> Iterator[OpStrategy]:
    """Over the batch, output channels, input channels (a sum), or groups of both.

    The weight is `[out, in / groups, ...]`, of transposed ones `[in, out / groups, ...]`.
    """
    x, weight, bias = (view.operand(name) for name in ("input", "weight", "bias"))
    assert x is not None and weight is not None
    space = [""] * (len(view.input(weight).shape) - 2)
    batch = ["n"] * (len(view.input(x).shape) - 1 - len(space))
    groups = integer(view.argument("groups"))
    inner, outer = ("i", "o") if groups == 1 else _grouped(view, x, len(space), parts)
    turned = "transpose" in view.packet or bool(view.argument("transposed", False))
    pair = [inner, outer] if turned else [outer, inner]
    if groups > 1:
        pair = [pair[0], ""]
    operands: list[Labelled] = [
        (x, [*batch, inner, *space]),
        (weight, [*pair, *space]),
        (bias, [outer]),
    ]
    return along_labels(view, parts, operands, [[*batch, outer, *space]], added=bias, linear=[x])


def _grouped(view: OpView, x: int, space: int, parts: int) -> tuple[str, str]:
    """Labels of input and output channels: one label, if every rank gets whole groups."""
    groups = integer(view.argument("groups"))
    channels = [type.shape for type in (view.input(x), view.output())]
    depthwise = all(shape[-space - 1] == groups for shape in channels)
    return ("g", "g") if depthwise or groups % parts == 0 else ("", "")


def _lower_convolution(lowering: Lowering) -> Sequence[Ref]:
    groups = integer(lowering.view.argument("groups"))
    changes: dict[str, Ref | int] = {**added_once(lowering, "bias")}
    if groups == 1:
        return call_with(lowering, changes)
    weight = lowering.view.operand("weight")
    assert weight is not None
    dim = len(lowering.output_type().shape) - len(lowering.view.input(weight).shape) + 1
    whole, local = lowering.view.output().shape[dim], lowering.output_type().shape[dim]
    return call_with(lowering, {**changes, "groups": groups * local // whole})


def _leading(space: int, *, linear: bool = False) -> StrategyRule:
    """All dims but the last `space`, which the operator works in."""

    def strategies(view: OpView, parts: int) -> Iterator[OpStrategy]:
        lead = len(view.input(0).shape) - space
        labels = [*(f"d{dim}" for dim in range(lead)), *[""] * space]
        results = [labels] * len(view.outputs)
        return along_labels(view, parts, [(0, labels)], results, linear=[0] if linear else [])

    return strategies


def _columns(view: OpView, parts: int) -> Iterator[OpStrategy]:
    """`[n, c, height, width]` to `[n, c x kernel, places]`, channels slowest."""
    batch = ["n"] * (len(view.input(0).shape) - 3)
    return along_labels(view, parts, [(0, [*batch, "c", "", ""])], [[*batch, "c", ""]], linear=[0])


def _grid(view: OpView, parts: int) -> Iterator[OpStrategy]:
    """Samples of `[n, c, ...]` at a grid of `[n, ..., coordinates]`."""
    space = len(view.input(0).shape) - 2
    fixed = [""] * space
    operands = [
        (view.operand("input"), ["n", "c", *fixed]),
        (view.operand("grid"), ["n", *fixed, ""]),
    ]
    return along_labels(view, parts, operands, [["n", "c", *fixed]])


def _pad(view: OpView, parts: int) -> Iterator[OpStrategy]:
    """All dims that get no padding."""
    pad, rank = view.argument("pad"), len(view.input(0).shape)
    assert isinstance(pad, tuple)
    padded = {rank - 1 - at // 2 for at, size in enumerate(pad) if size != 0}
    if view.argument("mode", "constant") != "constant":
        padded |= set(range(rank - len(pad) // 2, rank))
    labels = ["" if dim in padded else f"d{dim}" for dim in range(rank)]
    value = view.argument("value")
    linear = [0] if value is None or value == 0 else []
    return along_labels(view, parts, [(0, labels)], [labels], linear=linear)


def _weight_norm(view: OpView, parts: int) -> Iterator[OpStrategy]:
    """`g v / |v|`, a norm for each index of dim `dim`."""
    kept, rank = integer(view.argument("dim")), len(view.output().shape)
    labels = ["k" if dim == kept else "" for dim in range(rank)]
    operands = [(view.operand("v"), labels), (view.operand("g"), labels)]
    return along_labels(view, parts, operands, [labels])


_CONVOLUTIONS = (
    "conv1d conv2d conv3d convolution conv_transpose1d conv_transpose2d conv_transpose3d"
)

_SPACE: dict[str, int] = {
    "max_pool1d": 1,
    "max_pool2d": 2,
    "max_pool2d_with_indices": 2,
    "max_pool3d": 3,
    "adaptive_max_pool2d": 2,
    "pixel_shuffle": 3,
    "pixel_unshuffle": 3,
}
"""Operators on the last dims: how many."""

_LINEAR_SPACE: dict[str, int] = {
    "avg_pool1d": 1,
    "avg_pool2d": 2,
    "avg_pool3d": 3,
    "adaptive_avg_pool1d": 1,
    "adaptive_avg_pool2d": 2,
    "upsample_nearest1d": 1,
    "upsample_linear1d": 1,
    "upsample_nearest2d": 2,
    "upsample_bilinear2d": 2,
    "upsample_bicubic2d": 2,
}
"""Those that are linear."""

CONVOLUTIONS: Table = {
    **{packet: Rule(_convolution, _lower_convolution) for packet in _CONVOLUTIONS.split()},
    **{packet: Rule(_leading(space)) for packet, space in _SPACE.items()},
    **{packet: Rule(_leading(space, linear=True)) for packet, space in _LINEAR_SPACE.items()},
    "grid_sampler": Rule(_grid),
    "im2col": Rule(_columns),
    "pad": Rule(_pad),
    "constant_pad_nd": Rule(_pad),
    "_weight_norm": Rule(_weight_norm),
}
