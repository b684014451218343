"""Memory rules of matrix products and attention; see `adjoints.py`.

Workspaces are measured ones of torch's CPU kernels (one thread); other backends need no more.
"""

from __future__ import annotations

from .adjoint_types import Adjoint, Gradient, NodeContext, joint_gradients, unknown
from .flops import keyword, positional

__all__ = ["attention", "einsum", "linear", "matmul"]


def linear(c: NodeContext) -> Adjoint:
    """linear, addmm: dx reads the weight, dw reads x, the bias nothing.

    An x of more than two dims that cannot be viewed as rows is copied, and the copy saved.
    """
    first = 0 if c.node.op.packet == "linear" else 1
    left, right = c.operand(first), c.operand(first + 1)
    if left is None or right is None:
        return unknown(c)
    copied = 0.0 if c.storages.folds(c.value(left), 1) else c.sizes[left]
    others = {left: (right,), right: () if copied else (left,)}
    return Adjoint(
        gradients=tuple(
            Gradient(index, others.get(index, ()), _narrow_scratch(c, index)) for index in c.wanted
        ),
        extra_bytes=copied if right in c.wanted else 0.0,
        forward_temporary_bytes=_narrow_scratch(c, c.node.outputs[0])
        + (0.0 if right in c.wanted else copied)
        + (c.out_bytes if copied and len(c.node.inputs) > 2 else 0.0),  # the bias comes after
    )


def _narrow_scratch(c: NodeContext, made: int) -> float:
    """Workspace of a 16-bit product on CPU: the result in float32 and a reordered operand."""
    if c.backend != "cpu" or c.value(made).type.dtype.itemsize != 2:
        return 0.0
    largest = max(c.sizes[index] for index in (*c.node.inputs, *c.node.outputs))
    return 2 * c.sizes[made] + largest


def matmul(c: NodeContext) -> Adjoint:
    """Each gradient reads the other operand, or the copy of it that could be multiplied."""
    left, right = c.operand(0), c.operand(1)
    if left is None or right is None:
        return unknown(c)
    dims = {index: len(c.value(index).type.shape) for index in (left, right)}
    copied = dict.fromkeys((left, right), 0.0)
    if c.node.op.packet == "matmul" and max(dims.values()) > 2:
        rows = 1 if min(dims.values()) <= 2 else 2
        for index in copied:
            if dims[index] > 2 and not c.storages.folds(c.value(index), rows):
                copied[index] = c.sizes[index]
    copies = sum(copied.values())
    if not c.wanted:
        return Adjoint(forward_temporary_bytes=copies + _narrow_scratch(c, c.node.outputs[0]))
    gradients = []
    for index in c.wanted:
        other = right if index == left else left
        stretched = c.value(other).type.shape[:-2] != c.value(index).type.shape[:-2]
        summed = c.sizes[other] if stretched and dims[index] > 2 else 0.0
        summed += _narrow_scratch(c, index)
        gradients.append(Gradient(index, () if copied[other] else (other,), summed))
    return Adjoint(
        gradients=tuple(gradients),
        extra_bytes=copies,
        forward_temporary_bytes=_narrow_scratch(c, c.node.outputs[0]),
    )


def einsum(c: NodeContext) -> Adjoint:
    """Runs as permutes, copies and a batched product: the copies are what is saved."""
    operands = sum(c.sizes[index] for index in c.node.inputs)
    return Adjoint(
        gradients=c.each(temporary=operands + c.out_bytes),
        extra_bytes=operands if c.wanted else 0.0,
        forward_temporary_bytes=c.out_bytes + (0.0 if c.wanted else operands),
    )


def attention(c: NodeContext) -> Adjoint:
    query, key, value = (c.operand(position) for position in range(3))
    if query is None or key is None or value is None:
        return unknown(c)
    if _is_fused(c, query, key, value):
        return _fused_attention(c, query, key, value)
    return _score_matrices(c, query, key, value)


def _dropout(c: NodeContext) -> float:
    probability = positional(c.node, 4, keyword(c.node, "dropout_p", 0.0))
    return probability if isinstance(probability, float) else 0.0


def _is_fused(c: NodeContext, query: int, key: int, value: int) -> bool:
    """Whether torch runs this call as one kernel that keeps no score matrix."""
    mask = c.operand(3)
    if _dropout(c) > 0.0 or (mask is not None and c.value(mask).requires_grad):
        return False
    shapes = [c.value(index).type.shape for index in (query, key, value)]
    if any(len(shape) != 4 for shape in shapes) or len({shape[-1] for shape in shapes}) > 1:
        return False
    return c.backend == "cpu" or c.value(query).type.dtype.itemsize < 8


def _fused_attention(c: NodeContext, query: int, key: int, value: int) -> Adjoint:
    """Saved: operands, result, one log-sum-exp a row. A boolean mask is first made a float one.

    The CPU kernel works on blocks of rows x up to 512 columns; its backward copies a gradient.
    """
    rows, size = c.value(query).type.shape[-2:]
    itemsize = c.value(query).type.dtype.itemsize
    wide = max(itemsize, 4)
    block = min(rows, 256 if rows >= 768 else 64 if rows >= 192 else 32)
    columns = min(512, c.value(key).type.shape[-2])
    statistics = c.sizes[query] / itemsize / max(size, 1) * wide
    mask = c.operand(3)
    converted = 0.0
    masks: tuple[int, ...] = ()
    if mask is not None:
        masks = (mask,)
        if c.value(mask).type.dtype.itemsize == 1:
            converted, masks = c.sizes[mask] * itemsize, ()
    reads = (*dict.fromkeys((query, key, value, *masks)), c.node.outputs[0])
    workspace = c.sizes[query] * wide / itemsize + 2 * block * columns * wide + statistics
    return Adjoint(
        gradients=joint_gradients(c.each(*reads), workspace),
        extra_bytes=statistics + converted,
        forward_temporary_bytes=wide * block * (columns + 2 + size),
        joint=True,
    )


def _score_matrices(c: NodeContext, query: int, key: int, value: int) -> Adjoint:
    """softmax(q k^T) v in steps. Saved: scaled q and k, v, softmax, dropout's mask and product.

    While numbers are drawn three 32-bit words an element are live; later steps need less.
    """
    shape, columns = c.value(query).type.shape, c.value(key).type.shape[-2]
    itemsize = c.value(query).type.dtype.itemsize
    # without dropout torch computes 16-bit operands in float32
    wide = 2 if itemsize == 2 and not _dropout(c) else 1
    elements = c.sizes[query] / itemsize / max(shape[-1], 1) * columns
    scores = elements * itemsize * wide
    heads = shape[-3] / c.value(key).type.shape[-3] if len(shape) > 3 else 1.0
    keys, values = c.sizes[key] * heads * wide, c.sizes[value] * heads * wide
    copies_value = heads > 1 or wide > 1 or not c.storages.folds(c.value(value), 2)
    scaled = c.sizes[query] * wide + keys
    saved = scaled + (values if copies_value else 0.0) + scores
    busy = scaled + 2.25 * scores + (2 * c.sizes[query] if wide > 1 else 0.0)
    if _dropout(c) > 0.0:
        saved += scores + elements
        busy = max(busy, scaled + scores + 12 * elements, scaled + 3 * scores + elements)
    mask = c.operand(3)
    if mask is not None and c.value(mask).type.dtype.itemsize == 1:
        saved += c.sizes[mask] * (1 if _dropout(c) > 0.0 else itemsize)
    if positional(c.node, 5, keyword(c.node, "is_causal", False)) is True:
        triangle = shape[-2] * columns * itemsize
        saved, busy = saved + triangle, busy + triangle
    written = sum(c.sizes[index] for index in c.wanted)
    computing = scores * (1 if _dropout(c) > 0.0 else 2) + (keys + values) * (heads > 1)
    return Adjoint(
        gradients=joint_gradients(
            c.each(*(() if copies_value else (value,))), max(0.0, computing + values - written)
        ),
        extra_bytes=saved if c.wanted else 0.0,
        forward_temporary_bytes=max(0.0, busy - (saved + c.out_bytes if c.wanted else 0.0)),
        joint=True,
    )
