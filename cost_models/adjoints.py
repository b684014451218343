"""What the backward of each op reads and allocates: the rules behind memory prediction.

A stage's backward runs as two kernels: B computes gradients of activations, W those of weights.
For every node this module says which tensors of the forward each gradient reads (so they are
saved), which tensors exist only to be saved (means, log-sum-exps, contiguous copies), which
gradients share the storage of the arriving one, and how much is allocated on the way. The rules
are those of torch's autograd formulas (`derivatives.yaml`) as `make_fx` records them; an op
without a rule is taken to save all operands and results.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from ..compiler.ir.graph import Graph, Node, Operand, Value
from ..compiler.ir.ops import Category
from .analysis import Storages
from .flops import keyword, positional

__all__ = ["Adjoint", "NodeContext", "adjoint"]


@dataclass(frozen=True, slots=True)
class Adjoint:
    """Memory behaviour of one node, forward and backward. Bytes are at the batch asked for.

    Args:
        reads: (operand id, value ids that its gradient reads) for operands that want a gradient.
        extra_bytes: tensors made in forward for backward alone.
        forward_temporary_bytes: live while the forward runs, beside operands, results, extras.
        backward_temporary_bytes: live while a gradient is computed, beside what it reads, what
            arrives and what it writes.
        joint: one kernel computes all gradients.
        aliased: operands whose gradient shares the storage of the arriving gradient.
    """

    reads: tuple[tuple[int, tuple[int, ...]], ...] = ()
    extra_bytes: float = 0.0
    forward_temporary_bytes: float = 0.0
    backward_temporary_bytes: float = 0.0
    joint: bool = False
    aliased: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class NodeContext:
    """One node with what its rule looks at. `sizes` are bytes by value id; `backend` is the
    torch device type that runs it."""

    graph: Graph
    node: Node
    storages: Storages
    sizes: tuple[float, ...]
    backend: str

    @property
    def wanted(self) -> tuple[int, ...]:
        """Operands that want a gradient; none if no result carries one."""
        values = self.graph.values
        if not any(values[index].requires_grad for index in self.node.outputs):
            return ()
        return tuple(i for i in self.node.inputs if values[i].requires_grad)

    @property
    def out_bytes(self) -> float:
        """Bytes of the first result."""
        return self.sizes[self.node.outputs[0]]

    @property
    def all_bytes(self) -> float:
        return sum(self.sizes[i] for i in (*self.node.inputs, *self.node.outputs))

    def value(self, index: int) -> Value:
        return self.graph.values[index]

    def operand(self, position: int) -> int | None:
        """Value id of the tensor argument at `position`, or None."""
        argument = positional(self.node, position)
        return self.node.inputs[argument.index] if isinstance(argument, Operand) else None

    def copy_bytes(self, index: int) -> float:
        """Bytes of the copy that an op needing contiguous operands makes of `index`."""
        value = self.value(index)
        return 0.0 if self.storages.contiguous(value) else self.sizes[index]

    def each(self, *reads: int) -> tuple[tuple[int, tuple[int, ...]], ...]:
        """Every wanted gradient reads `reads`."""
        return tuple((index, reads) for index in self.wanted)


def adjoint(context: NodeContext) -> Adjoint:
    """Memory behaviour of the node of `context`."""
    node = context.node
    if not node.outputs:
        return Adjoint()
    if node.op.random and node.op.category is not Category.ATTENTION:
        return _random(context)
    rule = _BY_PACKET.get(node.op.packet) or _BY_CATEGORY.get(node.op.category, _unknown)
    return rule(context)


def _unknown(c: NodeContext) -> Adjoint:
    return Adjoint(
        reads=c.each(*c.node.inputs, *c.node.outputs),
        forward_temporary_bytes=c.all_bytes,
        backward_temporary_bytes=2 * c.all_bytes,
    )


# -- nothing is saved --------------------------------------------------------------------------


def _linear_map(c: NodeContext) -> Adjoint:
    """add, neg, clone, cat, sum: gradients follow from the arriving one alone."""
    aliased = frozenset(
        index
        for index in c.wanted
        if c.value(index).type == c.value(c.node.outputs[0]).type and _keeps_gradient(c)
    )
    return Adjoint(
        reads=c.each(), aliased=aliased, backward_temporary_bytes=_broadcast_temporary(c)
    )


def _keeps_gradient(c: NodeContext) -> bool:
    plain = c.node.op.packet in ("add", "clone", "contiguous", "_to_copy", "to", "alias", "copy")
    return plain and keyword(c.node, "alpha", 1) == 1


def _broadcast_temporary(c: NodeContext) -> float:
    """A gradient of full size exists before it is summed to a broadcast operand's shape."""
    numel = c.value(c.node.outputs[0]).type.numel
    smaller = any(c.value(index).type.numel < numel for index in c.wanted)
    return c.out_bytes if smaller else 0.0


def _cat(c: NodeContext) -> Adjoint:
    return Adjoint(reads=c.each(), aliased=frozenset(c.wanted))  # slices of the arriving gradient


def _view(c: NodeContext) -> Adjoint:
    """The gradient is a view as well, unless the op took a part (zeros are put around it)."""
    packet = c.node.op.packet
    if packet in ("slice", "select", "diagonal", "as_strided", "narrow"):
        return Adjoint(reads=c.each())
    if packet in ("split", "chunk", "unbind", "split_with_sizes"):
        return Adjoint(reads=c.each())  # one cat of the parts
    if packet in ("expand", "expand_as"):
        return Adjoint(reads=c.each())  # a sum
    permutes = packet in ("transpose", "permute", "t", "movedim", "swapaxes", "swapdims")
    # a gradient whose dims are in another order in memory is copied before it can be viewed
    copies = 0.0 if permutes or packet in _SAME_ORDER else c.out_bytes
    return Adjoint(
        reads=c.each(), aliased=frozenset(c.wanted), backward_temporary_bytes=copies
    )


_SAME_ORDER = ("unsqueeze", "squeeze", "alias", "detach", "lift_fresh", "lift_fresh_copy")


def _reduction(c: NodeContext) -> Adjoint:
    """sum and mean expand the gradient; others compare, weigh or accumulate operands."""
    packet = c.node.op.packet
    source = c.node.inputs[0]
    if packet == "sum":
        same = c.value(source).type.dtype == c.value(c.node.outputs[0]).type.dtype
        return Adjoint(reads=c.each(), aliased=frozenset(c.wanted) if same else frozenset())
    if packet in ("mean", "cumsum"):
        return Adjoint(reads=c.each())
    if packet in ("var", "std", "var_mean", "norm", "linalg_vector_norm"):
        return Adjoint(
            reads=c.each(source, *c.node.outputs), backward_temporary_bytes=2 * c.sizes[source]
        )
    if packet in ("amax", "amin", "max", "min"):
        return Adjoint(
            reads=c.each(source, *c.node.outputs), backward_temporary_bytes=c.sizes[source]
        )
    return _unknown(c)


# -- elementwise -------------------------------------------------------------------------------


def _saves_output(temporaries: float) -> Callable[[NodeContext], Adjoint]:
    def rule(c: NodeContext) -> Adjoint:
        return Adjoint(
            reads=c.each(c.node.outputs[0]), backward_temporary_bytes=temporaries * c.out_bytes
        )

    return rule


def _saves_input(temporaries: float) -> Callable[[NodeContext], Adjoint]:
    def rule(c: NodeContext) -> Adjoint:
        return Adjoint(
            reads=c.each(c.node.inputs[0]), backward_temporary_bytes=temporaries * c.out_bytes
        )

    return rule


def _multiply(c: NodeContext) -> Adjoint:
    """Each operand's gradient reads the other operand; a scalar is not saved."""
    reads = tuple(
        (index, tuple(other for other in c.node.inputs if other != index) or _squared(c))
        for index in c.wanted
    )
    return Adjoint(reads=reads, backward_temporary_bytes=_broadcast_temporary(c))


def _squared(c: NodeContext) -> tuple[int, ...]:
    """Operands read when the only tensor operand appears once (scalar) or twice (square)."""
    tensors = sum(isinstance(argument, Operand) for argument in c.node.args)
    return c.node.inputs[:1] if tensors > 1 else ()


def _divide(c: NodeContext) -> Adjoint:
    """The numerator's gradient reads the denominator, the denominator's reads both."""
    denominator = c.operand(1)
    reads = []
    for index in c.wanted:
        if index == denominator:
            reads.append((index, tuple(c.node.inputs)))
        else:
            reads.append((index, (denominator,) if denominator is not None else ()))
    heavy = denominator in c.wanted
    temporary = _broadcast_temporary(c) + (2 * c.out_bytes if heavy else 0.0)
    return Adjoint(reads=tuple(reads), backward_temporary_bytes=temporary)


def _power(c: NodeContext) -> Adjoint:
    if c.operand(1) is None and c.operand(0) is not None:
        return Adjoint(reads=c.each(c.node.inputs[0]), backward_temporary_bytes=2 * c.out_bytes)
    return Adjoint(
        reads=c.each(*c.node.inputs, *c.node.outputs), backward_temporary_bytes=4 * c.out_bytes
    )


def _select_by_mask(c: NodeContext) -> Adjoint:
    """where and masked_fill: gradients read the mask."""
    position = 0 if c.node.op.packet == "where" else 1
    mask = c.operand(position)
    reads = () if mask is None else (mask,)
    return Adjoint(reads=c.each(*reads), backward_temporary_bytes=_broadcast_temporary(c))


def _compare(c: NodeContext) -> Adjoint:
    """maximum, clamp: gradients read the operands through boolean masks."""
    return Adjoint(reads=c.each(*c.node.inputs), backward_temporary_bytes=1.5 * c.out_bytes)


# -- matrix products ---------------------------------------------------------------------------


def _linear(c: NodeContext) -> Adjoint:
    """linear, addmm: dx reads the weight, dw reads x, the bias nothing; dw lands in its buffer."""
    positions = (0, 1) if c.node.op.packet == "linear" else (1, 2)
    left, right = c.operand(positions[0]), c.operand(positions[1])
    reads = []
    for index in c.wanted:
        others = [item for item in (left, right) if item is not None and item != index]
        reads.append((index, tuple(others) if index in (left, right) else ()))
    copies = c.copy_bytes(left) if left is not None and c.node.op.packet == "linear" else 0.0
    return Adjoint(reads=tuple(reads), extra_bytes=copies)


def _matmul(c: NodeContext) -> Adjoint:
    """Each gradient reads the other operand, or the contiguous copy that was multiplied."""
    left, right = c.operand(0), c.operand(1)
    if left is None or right is None:
        return _unknown(c)
    batched = c.node.op.packet == "matmul" and max(
        len(c.value(left).type.shape), len(c.value(right).type.shape)
    ) > 2
    copied = {index: c.copy_bytes(index) if batched else 0.0 for index in (left, right)}
    reads = []
    for index in c.wanted:
        other = right if index == left else left
        reads.append((index, () if copied[other] else (other,)))
    extra = sum(copied.values())
    if not c.wanted:
        return Adjoint(forward_temporary_bytes=extra)
    return Adjoint(
        reads=tuple(reads), extra_bytes=extra, backward_temporary_bytes=_broadcast_temporary(c)
    )


def _attention(c: NodeContext) -> Adjoint:
    """Fused: query, key, value, output and one log-sum-exp a row. Math: the score matrices."""
    query, key, value = (c.operand(position) for position in range(3))
    if query is None or key is None or value is None:
        return _unknown(c)
    operands = sum(c.sizes[index] for index in dict.fromkeys((query, key, value)))
    shape = c.value(query).type.shape
    rows = c.sizes[query] / max(shape[-1], 1)  # bytes of one number per query row and head
    mask = c.operand(3)
    scores = rows * c.value(key).type.shape[-2]
    if _is_fused(c):
        statistics = rows * max(1.0, 4 / c.value(query).type.dtype.itemsize)
        masks = () if mask is None else (mask,)
        return Adjoint(
            reads=c.each(*dict.fromkeys((query, key, value, *masks)), c.node.outputs[0]),
            extra_bytes=statistics,
            backward_temporary_bytes=statistics + 0.1 * operands,
            joint=True,
        )
    dropout = positional(c.node, 4, keyword(c.node, "dropout_p", 0.0))
    random = isinstance(dropout, float) and dropout > 0.0
    itemsize = c.value(query).type.dtype.itemsize
    # saved: scaled query and key, copy of value, softmax, and with dropout its mask and product
    saved = operands + scores * (2 + 1 / itemsize if random else 1)
    hashing = scores * 12 / itemsize if random else 0.0
    return Adjoint(
        reads=c.each(),
        extra_bytes=saved,
        forward_temporary_bytes=2 * scores + hashing,
        backward_temporary_bytes=2 * scores + operands,
        joint=True,
    )


def _is_fused(c: NodeContext) -> bool:
    """Whether torch runs this call as one kernel that keeps no score matrix."""
    dropout = positional(c.node, 4, keyword(c.node, "dropout_p", 0.0))
    if isinstance(dropout, float) and dropout > 0.0:
        return False
    query, key, value = (c.operand(position) for position in range(3))
    mask = c.operand(3)
    if query is None or key is None or value is None:
        return False
    if mask is not None and c.value(mask).requires_grad:
        return False
    shapes = [c.value(index).type.shape for index in (query, key, value)]
    if any(len(shape) != 4 for shape in shapes) or len({shape[-1] for shape in shapes}) > 1:
        return False
    double = c.value(query).type.dtype.itemsize == 8
    return c.backend == "cpu" or not double


# -- norms, softmax, losses --------------------------------------------------------------------


def _norm(c: NodeContext) -> Adjoint:
    """Operand, weight and one mean and reciprocal deviation per group; one kernel for all."""
    source = c.node.inputs[0]
    saved = tuple(i for i in c.node.outputs[1:] if c.value(i).type.is_float)
    groups = 0.0
    if not saved:
        groups = 2 * max(8.0, _num_groups(c) * 8.0)
    return Adjoint(
        reads=c.each(source, *c.node.inputs[1:2], *saved[:2]), extra_bytes=groups, joint=True
    )


def _num_groups(c: NodeContext) -> float:
    shape = c.value(c.node.inputs[0]).type.shape
    scale = c.sizes[c.node.inputs[0]] / max(1, c.value(c.node.inputs[0]).type.num_bytes)
    packet = c.node.op.packet
    if "layer_norm" in packet:
        normalized = positional(c.node, 1)
        last = len(normalized) if isinstance(normalized, tuple) else 1
        return math.prod(shape[: len(shape) - last]) * scale
    if "group_norm" in packet:
        groups = positional(c.node, 1)
        return shape[0] * (groups if isinstance(groups, int) else shape[1]) * scale
    return float(shape[1] if len(shape) > 1 else 1)


def _rms_norm(c: NodeContext) -> Adjoint:
    """Runs as pow, mean, rsqrt, mul, mul: the normalised operand is saved beside the operand."""
    source = c.node.inputs[0]
    size = c.sizes[source]
    last = c.value(source).type.shape[-1]
    return Adjoint(
        reads=c.each(*c.node.inputs),
        extra_bytes=size + 2 * size / last,
        forward_temporary_bytes=size,
        backward_temporary_bytes=3 * size,
        joint=True,
    )


def _softmax(c: NodeContext) -> Adjoint:
    return Adjoint(reads=c.each(c.node.outputs[0]))


def _logsumexp(c: NodeContext) -> Adjoint:
    source = c.node.inputs[0]
    size = c.sizes[source]
    return Adjoint(
        reads=c.each(source, c.node.outputs[0]),
        forward_temporary_bytes=2 * size,
        backward_temporary_bytes=2 * size,
    )


def _cross_entropy(c: NodeContext) -> Adjoint:
    """log_softmax, which is saved, then nll_loss; backward makes a gradient for each."""
    size = c.sizes[c.node.inputs[0]]
    return Adjoint(
        reads=c.each(*c.node.inputs[1:]), extra_bytes=size, backward_temporary_bytes=size
    )


def _loss(c: NodeContext) -> Adjoint:
    largest = max(c.sizes[index] for index in c.node.inputs)
    return Adjoint(
        reads=c.each(*c.node.inputs, *c.node.outputs[1:]),
        forward_temporary_bytes=largest,
        backward_temporary_bytes=2 * largest,
    )


def _nll_loss(c: NodeContext) -> Adjoint:
    return Adjoint(reads=c.each(*c.node.inputs[1:], *c.node.outputs[1:]))


# -- convolution, pooling, lookup, recurrence --------------------------------------------------


def _convolution(c: NodeContext) -> Adjoint:
    """dI reads the weight, dW the image, in two kernels.

    In float64 on CPU torch unfolds the image into columns, kernel size times as large.
    """
    image, weight = c.node.inputs[0], c.node.inputs[1]
    reads = []
    for index in c.wanted:
        others = {image: (weight,), weight: (image,)}.get(index, ())
        reads.append((index, others))
    columns = 0.0
    if c.backend == "cpu" and c.value(image).type.dtype.itemsize == 8:
        kernel = math.prod(c.value(weight).type.shape[2:])
        image_shape = c.value(image).type.shape
        spatial = c.value(c.node.outputs[0]).type.shape[2:]
        rows = c.sizes[image] / max(1, math.prod(image_shape[2:]))
        columns = rows * kernel * math.prod(spatial) if kernel > 1 else 0.0
    return Adjoint(
        reads=tuple(reads),
        forward_temporary_bytes=columns,
        backward_temporary_bytes=columns + c.sizes[weight],
    )


def _pooling(c: NodeContext) -> Adjoint:
    """Max pooling saves its operand and the positions (int64) of the maxima."""
    packet = c.node.op.packet
    source = c.node.inputs[0]
    if "max_pool" in packet:
        itemsize = c.value(source).type.dtype.itemsize
        shown = len(c.node.outputs) > 1
        return Adjoint(
            reads=c.each(source, *c.node.outputs[1:]),
            extra_bytes=0.0 if shown else c.out_bytes * 8 / itemsize,
        )
    if "grid_sampler" in packet:
        return Adjoint(reads=c.each(*c.node.inputs), joint=True)
    return Adjoint(reads=c.each(source) if "avg_pool" in packet else c.each())


def _lookup(c: NodeContext) -> Adjoint:
    """embedding: the gradient of the table reads the indices and has the table's size."""
    return Adjoint(reads=c.each(*c.node.inputs[1:]))


def _indexing(c: NodeContext) -> Adjoint:
    """Gradients are zeros of the operand's size into which rows are put (out of place)."""
    indices = [i for i in c.node.inputs if not c.value(i).type.is_float]
    largest = max((c.sizes[i] for i in c.wanted), default=0.0)
    return Adjoint(reads=c.each(*indices), backward_temporary_bytes=largest)


def _recurrent(c: NodeContext) -> Adjoint:
    """Every layer and step keeps gates and states: about seven times the output."""
    largest = max(c.sizes[i] for i in (*c.node.inputs, *c.node.outputs))
    layers = sum(len(c.value(i).type.shape) == 2 for i in c.node.inputs) / 2
    saved = max(1.0, layers) * 7 * largest
    return Adjoint(
        reads=c.each(*c.node.inputs, *c.node.outputs),
        extra_bytes=saved,
        forward_temporary_bytes=2 * largest,
        backward_temporary_bytes=2 * saved,
        joint=True,
    )


def _copy_like(c: NodeContext) -> Adjoint:
    """pad, roll, repeat, tril, dtype change: the gradient is a new tensor."""
    return Adjoint(reads=c.each(), backward_temporary_bytes=_broadcast_temporary(c))


def _random(c: NodeContext) -> Adjoint:
    """Counter-based draws: three 32-bit words an element while hashing, then a boolean mask."""
    out = c.value(c.node.outputs[0]).type
    words = 12.0 * c.out_bytes / out.dtype.itemsize
    mask = c.out_bytes / out.dtype.itemsize
    shown = len(c.node.outputs) > 1  # native_dropout returns its mask
    saved = tuple(c.node.outputs[1:])
    return Adjoint(
        reads=c.each(*saved),
        extra_bytes=0.0 if shown or not c.wanted else mask,
        forward_temporary_bytes=words,
        backward_temporary_bytes=c.out_bytes,
    )


_Rule = Callable[[NodeContext], Adjoint]


def _rules() -> dict[str, _Rule]:
    table: dict[str, _Rule] = {}
    groups: tuple[tuple[_Rule, str], ...] = (
        (_linear_map, "add sub rsub neg clone contiguous _to_copy to copy alias fill"),
        (_cat, "cat concat stack hstack vstack"),
        (_multiply, "mul"),
        (_divide, "div true_divide"),
        (_power, "pow square"),
        (_saves_output(0.0), "tanh sigmoid relu"),
        (_saves_output(1.0), "exp sqrt reciprocal expm1 exp2"),
        (_saves_output(2.0), "rsqrt"),
        (
            _saves_input(0.0),
            "gelu silu elu leaky_relu hardtanh hardswish hardsigmoid mish relu6 selu celu "
            "threshold softshrink hardshrink softplus",
        ),
        (_saves_input(1.0), "sin cos log log1p log2 log10 abs log_sigmoid logit"),
        (_saves_input(2.0), "erf tan erfinv glu prelu"),
        (_select_by_mask, "where masked_fill"),
        (_compare, "maximum minimum clamp clamp_min clamp_max"),
        (_linear, "linear addmm"),
        (_matmul, "matmul mm bmm mv dot"),
        (_rms_norm, "rms_norm"),
        (_logsumexp, "logsumexp"),
        (_cross_entropy, "cross_entropy_loss"),
        (_nll_loss, "nll_loss_forward nll_loss nll_loss_nd nll_loss2d nll_loss2d_forward"),
    )
    for rule, packets in groups:
        table.update(dict.fromkeys(packets.split(), rule))
    return table


_BY_PACKET: dict[str, _Rule] = _rules()
_BY_CATEGORY: dict[Category, _Rule] = {
    Category.VIEW: _view,
    Category.COPY: _copy_like,
    Category.FACTORY: lambda c: Adjoint(),
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
