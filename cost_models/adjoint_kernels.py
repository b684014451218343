"""Memory rules of ops with a kernel of their own: products, attention, norms, losses, pooling.

See `adjoints.py`, which holds the elementwise ones and the tables. Workspaces are measured ones of
torch's CPU kernels (one thread); other backends need no more.
"""

from __future__ import annotations

import math

from ..compiler.ir.ops import Category
from .adjoint_types import Adjoint, Gradient, NodeContext, Rule
from .flops import is_transposed, keyword, positional

__all__ = ["KERNEL_RULES", "KERNEL_RULES_BY_CATEGORY", "unknown"]


def unknown(c: NodeContext) -> Adjoint:
    """An op without a rule: everything it touches is saved, temporaries are generous."""
    return Adjoint(
        gradients=c.each(*c.node.inputs, *c.node.outputs, temporary=2 * c.all_bytes),
        forward_temporary_bytes=c.all_bytes,
    )


# -- matrix products ---------------------------------------------------------------------------


def _linear(c: NodeContext) -> Adjoint:
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


def _matmul(c: NodeContext) -> Adjoint:
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


def _einsum(c: NodeContext) -> Adjoint:
    """Runs as permutes, copies and a batched product: the copies are what is saved."""
    operands = sum(c.sizes[index] for index in c.node.inputs)
    return Adjoint(
        gradients=c.each(temporary=operands + c.out_bytes),
        extra_bytes=operands if c.wanted else 0.0,
        forward_temporary_bytes=c.out_bytes + (0.0 if c.wanted else operands),
    )


# -- attention ---------------------------------------------------------------------------------


def _attention(c: NodeContext) -> Adjoint:
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
        gradients=_joint(c.each(*reads), workspace),
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
        gradients=_joint(
            c.each(*(() if copies_value else (value,))), max(0.0, computing + values - written)
        ),
        extra_bytes=saved if c.wanted else 0.0,
        forward_temporary_bytes=max(0.0, busy - (saved + c.out_bytes if c.wanted else 0.0)),
        joint=True,
    )


def _joint(gradients: tuple[Gradient, ...], temporary: float) -> tuple[Gradient, ...]:
    """Gradients of one kernel, whose workspace is counted with the first."""
    if not gradients:
        return ()
    first = Gradient(gradients[0].operand, gradients[0].reads, temporary)
    return (first, *gradients[1:])


# -- norms, softmax, losses --------------------------------------------------------------------


def _norm(c: NodeContext) -> Adjoint:
    """Operand, weight and one mean and reciprocal deviation per group; one kernel for all."""
    source = c.node.inputs[0]
    saved = tuple(i for i in c.node.outputs[1:3] if c.value(i).type.is_float)
    groups = 0.0
    if not saved:
        groups = 2 * _num_groups(c) * max(4, c.value(source).type.dtype.itemsize)
    workspace = 2 * sum(c.sizes[index] for index in c.node.inputs[1:3]) + groups
    if "batch_norm" in c.node.op.packet or "instance_norm" in c.node.op.packet:
        workspace += c.sizes[source]
    return Adjoint(
        gradients=_joint(c.each(source, *c.node.inputs[1:2], *saved), workspace),
        extra_bytes=groups if c.wanted else 0.0,
        forward_temporary_bytes=workspace - c.sizes[source] if workspace > c.sizes[source] else 0.0,
        joint=True,
    )


def _num_groups(c: NodeContext) -> float:
    """Means that are computed: rows of a layer norm, groups of a group norm, channels."""
    shape = c.value(c.node.inputs[0]).type.shape
    scale = c.sizes[c.node.inputs[0]] / max(1, c.value(c.node.inputs[0]).type.num_bytes)
    packet = c.node.op.packet
    if "layer_norm" in packet:
        normalized = positional(c.node, 1)
        last = len(normalized) if isinstance(normalized, tuple) else 1
        return math.prod(shape[: len(shape) - last]) * scale
    if "group_norm" in packet:
        groups = next((a for a in c.node.args[1:] if isinstance(a, int)), shape[1])
        return shape[0] * groups * scale
    return float(shape[1] if len(shape) > 1 else 1)


def _rms_norm(c: NodeContext) -> Adjoint:
    """Runs as pow, mean, rsqrt, mul, mul: the normalised operand is saved beside the operand.

    16-bit operands are computed in float32, of which two tensors are saved.
    """
    source = c.node.inputs[0]
    narrow = c.value(source).type.dtype.itemsize == 2
    size = c.sizes[source] * (2 if narrow else 1)
    saved = size * (2 if narrow else 1)
    gradients = tuple(
        Gradient(index, c.node.inputs, 2 * saved) if index == source else Gradient(index, (), size)
        for index in c.wanted
    )
    return Adjoint(
        gradients=gradients,
        extra_bytes=saved + 2 * size / c.value(source).type.shape[-1] if c.wanted else 0.0,
        forward_temporary_bytes=size if c.wanted else 2 * saved,
    )


def _softmax(c: NodeContext) -> Adjoint:
    return Adjoint(c.each(c.node.outputs[0]))


def _logsumexp(c: NodeContext) -> Adjoint:
    source = c.node.inputs[0]
    return Adjoint(
        gradients=c.each(source, c.node.outputs[0], temporary=c.sizes[source]),
        forward_temporary_bytes=c.sizes[source] + 2 * c.out_bytes,
    )


def _cross_entropy(c: NodeContext) -> Adjoint:
    """log_softmax, which is saved, then nll_loss; backward makes a gradient for each."""
    size = c.sizes[c.node.inputs[0]]
    return Adjoint(
        gradients=c.each(*c.node.inputs[1:], temporary=size),
        extra_bytes=size if c.wanted else 0.0,
        forward_temporary_bytes=0.0 if c.wanted else size,
    )


def _nll_loss(c: NodeContext) -> Adjoint:
    return Adjoint(c.each(*c.node.inputs, *c.node.outputs[1:]))


def _loss(c: NodeContext) -> Adjoint:
    """Losses of two tensors, element by element and then a mean."""
    largest = max(c.sizes[index] for index in c.node.inputs)
    largest *= 2 if c.value(c.node.inputs[0]).type.dtype.itemsize == 2 else 1
    temporaries = 5 if "cross_entropy" in c.node.op.packet or "kl" in c.node.op.packet else 2
    return Adjoint(
        gradients=c.each(*c.node.inputs, *c.node.outputs[1:], temporary=largest / 2),
        forward_temporary_bytes=temporaries * largest,
    )


def _reduction(c: NodeContext) -> Adjoint:
    """sum and mean expand the gradient; others compare, weigh or accumulate operands."""
    packet, source = c.node.op.packet, c.node.inputs[0]
    narrow = c.value(source).type.dtype.itemsize == 2
    size = c.sizes[source] * (3 if narrow else 1)
    if packet == "sum":
        same = c.value(source).type.dtype == c.value(c.node.outputs[0]).type.dtype
        return Adjoint(c.each(), aliased=frozenset(c.wanted if same else ()))
    if packet == "mean":
        return Adjoint(c.each(), forward_temporary_bytes=2 * c.sizes[source] if narrow else 0.0)
    if packet == "cumsum":
        return Adjoint(c.each(temporary=size))
    if len(c.node.outputs) > 1 and packet in ("max", "min"):
        return Adjoint(c.each(c.node.outputs[1], temporary=size))
    if packet in ("var", "std", "var_mean", "norm", "linalg_vector_norm", "amax", "amin"):
        return Adjoint(c.each(source, *c.node.outputs, temporary=size))
    return unknown(c)


# -- convolution, pooling, lookup, recurrence --------------------------------------------------


def _convolution(c: NodeContext) -> Adjoint:
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


def _convolution_workspaces(
    c: NodeContext, image: int, weight: int
) -> tuple[float, float, float]:
    """Forward, image gradient, weight gradient.

    Float64 and tiny images are unfolded into columns, kernel size times as large. Others are
    reordered, with weights and results, into blocks of 16 channels, unless the kernel is 1 x 1.
    """
    read, weights, made = c.sizes[image], c.sizes[weight], c.out_bytes
    kernel = math.prod(c.value(weight).type.shape[2:])
    itemsize = c.value(image).type.dtype.itemsize
    stride = positional(c.node, 3)
    strided = isinstance(stride, tuple) and any(step != 1 for step in stride)
    if kernel == 1 and not strided and itemsize >= 4:
        return 0.0, weights, 2 * weights
    if c.backend == "cpu" and (itemsize == 8 or _is_tiny(c, image, weight)):
        return _column_workspaces(c, image, weight)
    blocks_in, blocks_out = (_blocks(c, index) for index in (image, c.node.outputs[0]))
    inner, outer, kernels = read * blocks_in, made * blocks_out, weights * blocks_in * blocks_out
    narrow = 8 * kernels + inner if itemsize == 2 else 0.0
    back_image = max(inner + outer + kernels - read, inner, 2 * read if strided else 0.0)
    if c.value(image).type.shape[1] < 8:  # images of few channels are read as they are
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


def _column_workspaces(
    c: NodeContext, image: int, weight: int
) -> tuple[float, float, float]:
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


def _pooling(c: NodeContext) -> Adjoint:
    """Max pooling saves its operand and the positions (int64) of the maxima."""
    packet, source = c.node.op.packet, c.node.inputs[0]
    if "max_pool" in packet:
        shown = len(c.node.outputs) > 1
        return Adjoint(
            gradients=c.each(source, *c.node.outputs[1:]),
            extra_bytes=0.0 if shown or not c.wanted else 8 * c.out_elements,
        )
    if "grid_sampler" in packet:
        return Adjoint(c.each(*c.node.inputs), joint=True)
    if "avg_pool" in packet:
        single = c.value(c.node.outputs[0]).type.shape[2:]
        whole = "adaptive" in packet and math.prod(single) == 1  # runs as a mean
        narrow = c.value(source).type.dtype.itemsize == 2
        return Adjoint(
            gradients=c.each(*(() if whole else (source,))),
            forward_temporary_bytes=2 * c.sizes[source] if whole and narrow else 0.0,
        )
    return Adjoint(c.each(), forward_temporary_bytes=1.5 * c.out_bytes)


def _lookup(c: NodeContext) -> Adjoint:
    """embedding: the gradient of the table reads the indices and has the table's size."""
    return Adjoint(c.each(*c.node.inputs[1:]))


def _indexing(c: NodeContext) -> Adjoint:
    """Gradients are zeros of the operand's size into which rows are put (out of place)."""
    reads = [i for i in (*c.node.inputs, *c.node.outputs[1:]) if not c.value(i).type.is_float]
    narrow = c.value(c.node.outputs[0]).type.dtype.itemsize == 2  # added up in float32
    return Adjoint(
        gradients=tuple(
            Gradient(i, tuple(reads), (3 if narrow else 1) * c.sizes[i]) for i in c.wanted
        ),
        forward_temporary_bytes=2 * c.out_bytes if narrow else 0.0,
    )


def _recurrent(c: NodeContext) -> Adjoint:
    """Every layer and step keeps gates and states; weight gradients are summed over steps."""
    largest = max(c.sizes[i] for i in (*c.node.inputs, *c.node.outputs))
    layers = sum(len(c.value(i).type.shape) == 2 for i in c.node.inputs) / 2
    saved = max(1.0, layers) * 7 * largest
    return Adjoint(
        gradients=c.each(*c.node.inputs, *c.node.outputs, temporary=largest),
        extra_bytes=saved if c.wanted else 0.0,
        forward_temporary_bytes=2 * largest,
    )


_GROUPS: tuple[tuple[Rule, str], ...] = (
    (_linear, "linear addmm"),
    (_matmul, "matmul mm bmm mv dot"),
    (_einsum, "einsum"),
    (_rms_norm, "rms_norm"),
    (_logsumexp, "logsumexp"),
    (_cross_entropy, "cross_entropy_loss"),
    (_nll_loss, "nll_loss_forward nll_loss nll_loss_nd nll_loss2d nll_loss2d_forward"),
)
KERNEL_RULES: dict[str, Rule] = {
    packet: rule for rule, packets in _GROUPS for packet in packets.split()
}
KERNEL_RULES_BY_CATEGORY: dict[Category, Rule] = {
    Category.REDUCTION: _reduction,
    Category.ATTENTION: _attention,
    Category.CONVOLUTION: _convolution,
    Category.NORM: _norm,
    Category.SOFTMAX: _softmax,
    Category.LOSS: _loss,
    Category.POOLING: _pooling,
    Category.EMBEDDING: _lookup,
    Category.INDEXING: _indexing,
    Category.RECURRENT: _recurrent,
}
