"""Rules of operators that compute each element from those at the same place.

A dim is sharded alike in all operands that have it. Terms of a sum pass what is linear in them:
casts to the same type, negation, products with a value that all ranks have, sums of terms. A sum
of terms and a whole value counts that value once (`as_partial`), and each rank then computes all of
its gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from ...ir.mesh import Partial, Placement, Replicate, Shard
from ..lowering import Lowering, Ref
from ..rule import Rule, Table
from ..strategy import OpStrategy, OpView
from .common import broadcast, dim_of, for_all, linear, moved, over, strategy, whole_dims

__all__ = ["ELEMENTWISE"]


def _homogeneous(view: OpView, parts: int) -> Iterator[OpStrategy]:
    if len(view.inputs) == 1:
        yield from broadcast(view, parts)
        yield from linear(view, [0])


def _sum(view: OpView, parts: int) -> Iterator[OpStrategy]:
    yield from broadcast(view, parts)
    terms = [view.operand("self"), view.operand("other")]
    yield from linear(view, terms)
    for term, whole in (terms, terms[::-1]):
        if term is None or whole is None or term == whole:
            continue
        if view.input(term).is_float and view.input(term).dtype == view.output().dtype:
            yield from strategy(view, [(term, Partial())], Partial(), full_gradients=(whole,))


def _lower_sum(lowering: Lowering) -> Sequence[Ref]:
    """A whole operand of a sum of terms becomes a term itself."""
    refs = list(lowering.inputs)
    for axis in lowering.axes_with(Partial, lowering.output_layouts[0]):
        for position, ref in enumerate(refs):
            if isinstance(lowering.input_placement(position, axis), Replicate):
                refs[position] = lowering.as_partial(ref, axis)
    return replace(lowering, inputs=tuple(refs)).same()


def _product(view: OpView, parts: int) -> Iterator[OpStrategy]:
    yield from broadcast(view, parts)
    yield from linear(view, [view.operand("self")])
    yield from linear(view, [view.operand("other")])


def _quotient(view: OpView, parts: int) -> Iterator[OpStrategy]:
    yield from broadcast(view, parts)
    if view.argument("rounding_mode") is None:
        yield from linear(view, [view.operand("self")])


def _choice(view: OpView, parts: int) -> Iterator[OpStrategy]:
    """`where` and `masked_fill`: linear in what they choose from, where a constant is zero."""
    yield from broadcast(view, parts)
    names = ("self", "value") if view.packet == "masked_fill" else ("self", "other")
    chosen = [name for name in names if view.argument(name) != 0]
    yield from linear(view, [view.operand(name) for name in chosen])


def _type_as(view: OpView, parts: int) -> Iterator[OpStrategy]:
    """Of the other operand nothing but the type is read."""
    x, other = view.operand("self"), view.operand("other")
    assert x is not None and other is not None
    ignored: list[Placement] = [Replicate(), *map(Shard, over(view.input(other), parts))]
    for placement in ignored:
        for dim in over(view.input(x), parts):
            yield from strategy(view, [(x, Shard(dim)), (other, placement)], Shard(dim))
        yield from strategy(view, [(other, placement)], Replicate(), full_gradients=(x,))


def _prelu(view: OpView, parts: int) -> Iterator[OpStrategy]:
    """One slope, or one a channel, which is dim 1."""
    slopes: Placement = Shard(0) if view.input(1).numel > 1 else Replicate()
    for dim in over(view.input(0), parts):
        weight = slopes if dim == 1 else Replicate()
        yield from strategy(view, [(0, Shard(dim)), (1, weight)], Shard(dim))


def _glu(view: OpView, parts: int) -> Iterator[OpStrategy]:
    """The halves of one dim meet."""
    dim = dim_of(view)
    assert dim is not None
    yield from whole_dims(view, parts, [dim])


def _reinterpreted(view: OpView, parts: int) -> Iterator[OpStrategy]:
    """Complex numbers as pairs in a last dim of size 2, and back."""
    rank = min(len(view.input(0).shape), len(view.output().shape))
    yield from moved(view, parts, {dim: dim for dim in range(rank)})


ELEMENTWISE: Table = {
    **for_all(
        "abs exp log log1p expm1 sqrt rsqrt pow square relu gelu silu sigmoid tanh softplus elu "
        "leaky_relu hardtanh hardswish hardsigmoid mish relu6 selu celu clamp clamp_min clamp_max "
        "clip minimum maximum fmin fmax sin cos tan asin acos atan sinh cosh asinh acosh atanh erf "
        "erfc erfinv floor ceil round trunc frac sign sgn reciprocal eq ne lt le gt ge logical_and "
        "logical_or logical_not logical_xor bitwise_and bitwise_or bitwise_not bitwise_xor "
        "bitwise_left_shift bitwise_right_shift addcmul addcdiv lerp fmod remainder floor_divide "
        "atan2 hypot isnan isinf isfinite log_sigmoid threshold log2 log10 xlogy nan_to_num "
        "softshrink hardshrink exp2 logit logaddexp polar complex fill copy copysign "
        "heaviside isclose real imag lgamma digamma __and__ __or__ __xor__",
        Rule(broadcast),
    ),
    **for_all(
        "neg negative clone contiguous alias detach lift_fresh lift_fresh_copy _to_copy to "
        "positive",
        Rule(_homogeneous),
    ),
    **for_all("add sub subtract rsub", Rule(_sum, _lower_sum)),
    **for_all("mul multiply", Rule(_product)),
    **for_all("div divide true_divide", Rule(_quotient)),
    **for_all("where masked_fill", Rule(_choice)),
    **for_all("view_as_real view_as_complex", Rule(_reinterpreted)),
    "glu": Rule(_glu),
    "prelu": Rule(_prelu),
    "type_as": Rule(_type_as),
}
