"""Memory rule of convolutions, with the workspaces of torch's CPU kernels; see `adjoints.py`."""

from __future__ import annotations

import math

from .adjoint_types import Adjoint, Gradient, NodeContext
from .flops import is_transposed, positional

__all__ = ["convolution"]


def convolution(c: NodeContext) -> Adjoint:
    """dI reads the weight, dW the image, in two kernels with workspaces of their own."""
    image, weight = c.node.inputs[0], c.node.inputs[1]
    forward, back_image, back_weight = _convolution_workspaces(c, image, weight)
    copied = 0.0 if c.storages.scattered.isdisjoint(c.node.outputs) else c.out_bytes
    rules = {
        image: Gradient(image, (weight,), back_image + copied),
        weight: Gradient(weight, (image,), back_weight + copied),
    }
    return Adjoint(
        gradients=tuple(rules.get(index, Gradient(index)) for index in c.wanted),
        forward_temporary_bytes=forward,
    )


def _convolution_workspaces(c: NodeContext, image: int, weight: int) -> tuple[float, float, float]:
    """Forward, image gradient, weight gradient.

    Float64 and tiny images are unfolded into columns, kernel size times as large. Others are
    reordered, with weights and results, into blocks of 16 channels; with kernels of 1 x 1 from some
    size on, which is another on each processor, so they always count.
    """
    read, weights, made = c.sizes[image], c.sizes[weight], c.out_bytes
    kernel = math.prod(c.value(weight).type.shape[2:])
    itemsize = c.value(image).type.dtype.itemsize
    stride = positional(c.node, 3)
    strided = isinstance(stride, tuple) and any(step != 1 for step in stride)
    pointwise = kernel == 1 and not strided
    if pointwise and (itemsize == 8 or (c.backend != "cpu" and itemsize == 4)):
        return 0.0, weights, 2 * weights
    if c.backend == "cpu" and not pointwise and (itemsize == 8 or _is_tiny(c, image, weight)):
        return _column_workspaces(c, image, weight)
    blocks_in, blocks_out = (_blocks(c, index) for index in (image, c.node.outputs[0]))
    inner, outer, kernels = read * blocks_in, made * blocks_out, weights * blocks_in * blocks_out
    narrow = 8 * kernels + inner if itemsize == 2 else 0.0
    back_image = max(inner + outer + kernels - read, inner, 2 * read if strided else 0.0)
    few = c.value(image).type.shape[1] < 8
    if few and not pointwise:  # such images are read as they are
        return max(outer, 2 * weights) + narrow, back_image + narrow, outer + 2 * weights + narrow
    return (
        max(inner + outer + kernels - made, outer, 2 * made if is_transposed(c.node) else 0.0),
        back_image + narrow,
        inner + outer + 2 * kernels + narrow,
    )


def _is_tiny(c: NodeContext, image: int, weight: int) -> bool:
    """Torch leaves single images of up to 20480 elements and small kernels to its own kernel."""
    value = c.value(image).type
    kernel = c.value(weight).type.shape[2:]
    elements = c.sizes[image] / value.dtype.itemsize
    return (
        elements <= 20480
        and elements * value.shape[0] <= value.numel
        and max(kernel) <= 3
        and c.value(weight).type.shape[1] == value.shape[1]
    )


def _column_workspaces(c: NodeContext, image: int, weight: int) -> tuple[float, float, float]:
    """Workspaces of float64 convolution, which multiplies with columns of the unfolded image.

    Grouped convolutions go group by group and join the parts; transposed ones unfold the result,
    their backward one row of the batch at a time.
    """
    read, weights, made = c.sizes[image], c.sizes[weight], c.out_bytes
    kernel = math.prod(c.value(weight).type.shape[2:])
    shape, result = c.value(image).type.shape, c.value(c.node.outputs[0]).type.shape
    if is_transposed(c.node):
        columns = made / max(1, math.prod(result[2:])) * kernel * math.prod(shape[2:])
        each = columns / max(shape[0], 1) + weights
        return columns + weights, each, each
    columns = read / max(1, math.prod(shape[2:])) * kernel * math.prod(result[2:])
    groups = shape[1] // max(c.value(weight).type.shape[1], 1)
    if groups <= 1:
        return columns, weights, columns + weights
    part = (columns + read + made) / groups
    return part + made, part + read, part + weights


def _blocks(c: NodeContext, index: int) -> float:
    """By how much a tensor grows when its channels are padded to blocks of 16."""
    channels = max(c.value(index).type.shape[1], 1)
    return -(-channels // 16) * 16 / channels
