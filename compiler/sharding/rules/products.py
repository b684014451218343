"""Rules of matrix products."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ...ir.mesh import Partial, Placement, Replicate, Shard
from ..lowering import Lowering, Ref
from ..rule import Rule, Table
from ..strategy import OpStrategy, OpView, can_shard

__all__ = ["PRODUCTS"]


def _linear(view: OpView, parts: int) -> Iterator[OpStrategy]:
    """`x[..., i] w[o, i]' + b[o]`: over leading dims, columns (o) or rows (i) of the weight."""
    x, weight = view.input(0), view.input(1)
    last = len(x.shape) - 1
    bias: tuple[Placement, ...] = (Replicate(),) * (len(view.inputs) - 2)
    for dim in range(last):
        if can_shard(x, dim, parts):
            yield OpStrategy((Shard(dim), Replicate(), *bias), (Shard(dim),))
    if can_shard(weight, 0, parts):
        split: tuple[Placement, ...] = (Shard(0),) * len(bias)
        yield OpStrategy((Replicate(), Shard(0), *split), (Shard(last),))
    if can_shard(weight, 1, parts):
        # each rank computes the whole gradient of the bias, which is added once
        yield OpStrategy(
            (Shard(last), Shard(1), *bias), (Partial(),), full_gradients=(2,) if bias else ()
        )
    if not bias:
        yield OpStrategy((Partial(), Replicate()), (Partial(),))


def _lower_linear(lowering: Lowering) -> Sequence[Ref]:
    if len(lowering.inputs) < 3:
        return lowering.same()
    x, weight, bias = lowering.inputs
    for axis in lowering.axes_with(Partial, lowering.output_layouts[0]):
        bias = lowering.as_partial(bias, axis)
    return lowering.same(args=(x, weight, bias))


PRODUCTS: Table = {"linear": Rule(_linear, _lower_linear)}
