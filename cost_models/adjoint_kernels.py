"""Memory rules of ops with a kernel of their own: norms, losses, reductions, pooling, lookup.

See `adjoints.py`, which holds the elementwise ones.
"""

from __future__ import annotations

import math

from ..compiler.ir.ops import Category
from .adjoint_convolution import convolution
from .adjoint_products import attention, einsum, linear, matmul
from .adjoint_types import Adjoint, Gradient, NodeContext, Rule, joint_gradients, unknown
from .flops import positional

__all__ = ["KERNEL_RULES", "KERNEL_RULES_BY_CATEGORY"]


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
        gradients=joint_gradients(c.each(source, *c.node.inputs[1:2], *saved), workspace),
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


# -- pooling, lookup, recurrence ---------------------------------------------------------------


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
    (linear, "linear addmm"),
    (matmul, "matmul mm bmm mv dot"),
    (einsum, "einsum"),
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
    Category.ATTENTION: attention,
    Category.CONVOLUTION: convolution,
    Category.NORM: _norm,
    Category.SOFTMAX: _softmax,
    Category.LOSS: _loss,
    Category.POOLING: _pooling,
    Category.EMBEDDING: _lookup,
    Category.INDEXING: _indexing,
    Category.RECURRENT: _recurrent,
}
