"""Rules of softmax and its kin: over the other dims, and over the dim that they normalize."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from ...ir.mesh import Shard
from ..emit import cast, detached, elementwise, narrowed, reduced, widened
from ..labels import along_labels, integer
from ..lowering import Lowering, Ref
from ..rule import Rule, Table
from ..strategy import OpStrategy, OpView, can_shard

__all__ = ["SOFTMAX"]


def _dims(view: OpView) -> set[int]:
    """The dims that the operator normalizes or reduces."""
    rank, given = len(view.input(0).shape), view.argument("dim")
    dims = given if isinstance(given, tuple) else (given,)
    return {integer(dim) % max(rank, 1) for dim in dims}


def _others(view: OpView, parts: int) -> Iterator[OpStrategy]:
    dims, rank = _dims(view), len(view.input(0).shape)
    labels = ["" if dim in dims else f"d{dim}" for dim in range(rank)]
    kept = len(view.output().shape) == rank
    result = labels if kept else [label for label in labels if label]
    return along_labels(view, parts, [(0, labels)], [result])


def _all(view: OpView, parts: int) -> Iterator[OpStrategy]:
    yield from _others(view, parts)
    (dim,) = _dims(view)
    if can_shard(view.input(0), dim, parts):
        yield OpStrategy((Shard(dim),), (Shard(dim),))


def _lower(*, log: bool) -> Callable[[Lowering], Sequence[Ref]]:
    """Over the dim itself, maximum and sum are taken over the ranks.

    The maximum is subtracted from all elements, so its gradient cancels and needs no path.
    """

    def lower(lowering: Lowering) -> Sequence[Ref]:
        (dim,) = _dims(lowering.view)
        axes = lowering.axes_sharding(lowering.output_layouts[0], dim)
        if not axes:
            return lowering.same()
        x = widened(lowering, cast(lowering, lowering.inputs[0], lowering.output_type().dtype))
        top = reduced(lowering, "amax.default", detached(lowering, x), (dim,), keepdim=True)
        for axis in axes:
            top = lowering.all_reduce(top, axis, "max")
        shifted = elementwise(lowering, "sub.Tensor", x, top)
        powers = elementwise(lowering, "exp.default", shifted)
        total = reduced(lowering, "sum.dim_IntList", powers, (dim,), keepdim=True)
        for axis in axes:
            total = lowering.all_reduce(total, axis)
        if log:
            total = elementwise(lowering, "log.default", total)
        for axis in axes:
            total = lowering.sum_gradient(total, axis)
        left, op = (shifted, "sub.Tensor") if log else (powers, "div.Tensor")
        return (narrowed(lowering, elementwise(lowering, op, left, total)),)

    return lower


SOFTMAX: Table = {
    "softmax": Rule(_all, _lower(log=False)),
    "_softmax": Rule(_all, _lower(log=False)),
    "log_softmax": Rule(_all, _lower(log=True)),
    "_log_softmax": Rule(_all, _lower(log=True)),
    # rows that are all -inf give zeros, where the plain formula gives nan
    "_safe_softmax": Rule(_others),
    "logsumexp": Rule(_others),
}
