"""What the backward of each op reads and allocates: the rules behind memory prediction.

A stage's backward runs as two kernels: B computes gradients of activations, W those of weights.
For every node this module says which tensors of the forward each gradient reads (so they are
saved), which tensors exist only to be saved (means, log-sum-exps, contiguous copies), which
gradients share the storage of the arriving one, and how much is allocated on the way. The rules
are those of torch's autograd formulas (`derivatives.yaml`) as `make_fx` records them, and each is
tested against measured memory; an op without a rule is taken to save all operands and results.
"""

from __future__ import annotations

from ..compiler.ir.graph import Operand
from ..compiler.ir.ops import Category
from .adjoint_kernels import KERNEL_RULES, KERNEL_RULES_BY_CATEGORY
from .adjoint_types import Adjoint, Gradient, NodeContext, Rule, unknown
from .buffers import exchange_bytes, gather_bytes, scatter_bytes
from .flops import keyword, positional

__all__ = ["adjoint"]


def adjoint(context: NodeContext) -> Adjoint:
    """Memory behaviour of the node of `context`."""
    node = context.node
    if not node.outputs:
        return Adjoint()
    if node.op.random and node.op.category is not Category.ATTENTION:
        return _random(context)
    rule = _BY_PACKET.get(node.op.packet) or _BY_CATEGORY.get(node.op.category, unknown)
    return rule(context)


# -- nothing is saved --------------------------------------------------------------------------


def _collective(c: NodeContext) -> Adjoint:
    """Buffers of the collective, forward, and of the one that is its adjoint."""
    operand, result = c.sizes[c.node.inputs[0]], c.out_bytes
    packet, backend = c.node.op.packet, c.backend
    forward = backward = 0.0
    if packet in ("all_gather", "reduce_scatter", "shard"):
        dim, listed = c.node.args[2], c.node.args[3]
        assert isinstance(dim, int) and isinstance(listed, tuple)
        sizes = [size for size in listed if isinstance(size, int)]
        count, (part, whole) = len(sizes), sorted((operand, result))
        part = max(part, whole * max(sizes) / sum(sizes))
        gather = gather_bytes(part, whole, count, dim, backend)
        scatter = scatter_bytes(whole, part, count, backend)
        is_gather = packet == "all_gather"
        forward = {"all_gather": gather, "reduce_scatter": scatter, "shard": 0.0}[packet]
        backward = (scatter if c.node.args[5] else 0.0) if is_gather else gather
    elif packet == "all_to_all":
        forward = exchange_bytes(operand, result, backend)
        backward = exchange_bytes(result, operand, backend)
    return Adjoint(gradients=c.each(temporary=backward), forward_temporary_bytes=forward)


def _linear_map(c: NodeContext) -> Adjoint:
    """add, sub, clone, a dtype change: gradients follow from the arriving one alone."""
    result = c.value(c.node.outputs[0]).type
    keeps = c.node.op.packet in ("add", "sub", "clone", "contiguous", "_to_copy", "to", "copy")
    scaled = keyword(c.node, "alpha", 1) != 1
    first = c.node.inputs[:1] if c.node.op.packet == "sub" or scaled else c.node.inputs
    aliased = (i for i in c.wanted if keeps and i in first and c.value(i).type == result)
    return Adjoint(gradients=c.each(), aliased=frozenset(aliased))


def _cat(c: NodeContext) -> Adjoint:
    return Adjoint(gradients=c.each(), aliased=frozenset(c.wanted))  # slices of what arrives


def _new_tensor(c: NodeContext) -> Adjoint:
    """pad, roll, repeat, tril: the gradient is a new tensor."""
    return Adjoint(gradients=c.each())


def _view(c: NodeContext) -> Adjoint:
    """The gradient is a view as well, unless the op took a part (zeros are put around it).

    A gradient whose dims are in another order in memory is copied before it can be viewed.
    """
    shapes = c.node.op.packet in ("view", "reshape", "_unsafe_view", "flatten", "unflatten")
    copied = shapes and not c.storages.scattered.isdisjoint(c.node.outputs)
    if copied or c.node.op.packet in _PARTS:
        return Adjoint(c.each())
    return Adjoint(gradients=c.each(), aliased=frozenset(c.wanted))


_PARTS = frozenset(
    "slice select diagonal as_strided narrow unfold split chunk unbind split_with_sizes expand "
    "expand_as".split()
)


# -- elementwise -------------------------------------------------------------------------------


def _saves_output(temporaries: float) -> Rule:
    def rule(c: NodeContext) -> Adjoint:
        return Adjoint(c.each(c.node.outputs[0], temporary=temporaries * c.out_bytes))

    return rule


def _saves_input(temporaries: float) -> Rule:
    def rule(c: NodeContext) -> Adjoint:
        return Adjoint(c.each(c.node.inputs[0], temporary=temporaries * c.out_bytes))

    return rule


def _log_sigmoid(c: NodeContext) -> Adjoint:
    return Adjoint(c.each(c.node.inputs[0], temporary=c.out_bytes), extra_bytes=c.out_bytes)


def _unbroadcast(c: NodeContext, index: int) -> float:
    """A gradient of full size exists before it is summed to a broadcast operand's shape."""
    smaller = c.value(index).type.numel < c.value(c.node.outputs[0]).type.numel
    return c.out_bytes if smaller else 0.0


def _multiply(c: NodeContext) -> Adjoint:
    """Each operand's gradient reads the other operand; a scalar is not saved."""
    tensors = sum(isinstance(argument, Operand) for argument in c.node.args)
    if tensors > 1 and len(c.node.inputs) == 1:  # x * x: two products are added
        return Adjoint(c.each(c.node.inputs[0], temporary=c.out_bytes))
    return Adjoint(
        tuple(
            Gradient(index, tuple(i for i in c.node.inputs if i != index), _unbroadcast(c, index))
            for index in c.wanted
        )
    )


def _divide(c: NodeContext) -> Adjoint:
    """The numerator's gradient reads the denominator, the denominator's reads both."""
    denominator = c.operand(1)
    if denominator is None:
        return Adjoint(c.each())
    return Adjoint(
        tuple(
            Gradient(index, c.node.inputs, c.out_bytes + _unbroadcast(c, index))
            if index == denominator
            else Gradient(index, (denominator,), _unbroadcast(c, index))
            for index in c.wanted
        )
    )


def _power(c: NodeContext) -> Adjoint:
    if c.operand(1) is None and c.operand(0) is not None:
        return Adjoint(c.each(c.node.inputs[0], temporary=c.out_bytes))
    return Adjoint(c.each(*c.node.inputs, *c.node.outputs, temporary=4 * c.out_bytes))


def _select_by_mask(c: NodeContext) -> Adjoint:
    """where and masked_fill: gradients read the mask."""
    mask = c.operand(0 if c.node.op.packet == "where" else 1)
    reads = () if mask is None else (mask,)
    return Adjoint(tuple(Gradient(i, reads, _unbroadcast(c, i)) for i in c.wanted))


def _compare(c: NodeContext) -> Adjoint:
    """maximum, clamp: gradients read the operands through boolean masks."""
    masks = 3 * c.out_elements + (c.out_bytes if len(c.wanted) > 1 else 0.0)
    return Adjoint(c.each(*c.node.inputs, temporary=masks))


def _random(c: NodeContext) -> Adjoint:
    """Counter-based draws: three 32-bit words an element while hashing, then a boolean mask.

    Dropout selects by the mask and then scales. `native_dropout` returns its mask.
    """
    shown = len(c.node.outputs) > 1
    mask = c.out_elements
    inactive = c.node.random_draw is None or positional(c.node, 1) == 0.0
    if inactive:
        return Adjoint(c.each(), aliased=frozenset() if shown else frozenset(c.wanted))
    return Adjoint(
        gradients=c.each(*c.node.outputs[1:], temporary=c.out_bytes),
        extra_bytes=0.0 if shown or not c.wanted else mask,
        forward_temporary_bytes=max(12 * mask - c.out_bytes - mask, c.out_bytes),
    )


# -- tables ------------------------------------------------------------------------------------

_GROUPS: tuple[tuple[Rule, str], ...] = (
    (_linear_map, "add sub rsub neg clone contiguous _to_copy to copy fill"),
    (_cat, "cat concat stack hstack vstack"),
    (_multiply, "mul"),
    (_divide, "div true_divide"),
    (_power, "pow square"),
    (_saves_output(0.0), "tanh sigmoid relu exp"),
    (_saves_output(1.0), "sqrt expm1 exp2"),
    (_saves_output(2.0), "rsqrt reciprocal"),
    (
        _saves_input(0.0),
        "gelu silu elu leaky_relu hardtanh hardswish hardsigmoid mish relu6 selu celu threshold "
        "softshrink hardshrink softplus log glu",
    ),
    (_saves_input(1.0), "sin cos log1p log2 log10 abs logit erf"),
    (_saves_input(2.0), "tan erfinv prelu"),
    (_log_sigmoid, "log_sigmoid log_sigmoid_forward"),
    (_select_by_mask, "where masked_fill"),
    (_compare, "maximum minimum clamp clamp_min clamp_max"),
    (_view, "unfold broadcast_tensors"),
)
_BY_PACKET: dict[str, Rule] = {
    **KERNEL_RULES,
    **{packet: rule for rule, packets in _GROUPS for packet in packets.split()},
}
_BY_CATEGORY: dict[Category, Rule] = {
    **KERNEL_RULES_BY_CATEGORY,
    Category.VIEW: _view,
    Category.COPY: _new_tensor,
    Category.COLLECTIVE: _collective,
    Category.FACTORY: lambda c: Adjoint(),
}
