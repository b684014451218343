"""Rules of reductions, and of operators that work along some dims and keep the shape.

Dims that are kept can be sharded. A sum over a sharded dim is a term of the whole sum; so is a
mean, scaled by the share of elements that a rank has: parts may be uneven.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from ...ir.mesh import Partial, Replicate, Shard
from ..lowering import Lowering, Ref
from ..rule import Rule, Table
from ..strategy import OpStrategy, OpView
from .common import broadcast, dim_of, dims_of, for_all, linear, moved, over, strategy, whole_dims

__all__ = ["REDUCTIONS"]


def _kept(view: OpView, reduced: Sequence[int]) -> dict[int, int]:
    """Where the dims that are not reduced are in the result."""
    rank = len(view.input(0).shape)
    kept = [dim for dim in range(rank) if dim not in reduced]
    if view.argument("keepdim", view.argument("keepdims", False)):
        return {dim: dim for dim in kept}
    return {old: new for new, old in enumerate(kept)}


def _reduction(view: OpView, parts: int) -> Iterator[OpStrategy]:
    if view.node.op.name.endswith(".other"):  # of two tensors, element by element
        yield from broadcast(view, parts)
    else:
        yield from moved(view, parts, _kept(view, dims_of(view)))


def _sum(view: OpView, parts: int) -> Iterator[OpStrategy]:
    """`sum`, `mean`, `count_nonzero`: sums over a sharded dim are terms."""
    reduced = dims_of(view)
    yield from moved(view, parts, _kept(view, reduced))
    for dim in over(view.input(0), parts):
        if dim in reduced:
            yield from strategy(view, [(0, Shard(dim))], Partial())
    if view.packet != "count_nonzero":
        yield from linear(view, [0])


def _lower_mean(lowering: Lowering) -> Sequence[Ref]:
    """Means of parts, each scaled by its share of the elements that the mean is over."""
    view = lowering.view
    reduced = dims_of(view)
    local = lowering.type(lowering.inputs[0]).shape
    count = math.prod(local[dim] for dim in reduced)
    total = math.prod(view.input(0).shape[dim] for dim in reduced)
    if count == total:
        return lowering.same()
    args = [lowering.filled(item) for item in lowering.node.args]
    kwargs = [(name, lowering.filled(item)) for name, item in lowering.node.kwargs]
    mean = lowering.emit(lowering.node.op.name, args, lowering.output_type(), kwargs=kwargs)
    return lowering.same(op="aten.mul.Tensor", args=(mean, count / total), kwargs=())


def _along(view: OpView, parts: int) -> Iterator[OpStrategy]:
    """Works along one dim, or all if it names none; what else it reads is whole."""
    dim = dim_of(view)
    yield from whole_dims(view, parts, dims_of(view) if dim is None else [dim])


def _linear_along(view: OpView, parts: int) -> Iterator[OpStrategy]:
    yield from linear(view, [0])
    yield from _along(view, parts)


def _transform(view: OpView, parts: int) -> Iterator[OpStrategy]:
    """Fourier transforms of one dim or several."""
    yield from whole_dims(view, parts, dims_of(view))


def _bucketize(view: OpView, parts: int) -> Iterator[OpStrategy]:
    """Places of values among whole boundaries."""
    values = view.operand("self")
    if values is None:
        return
    for dim in over(view.input(values), parts):
        yield from strategy(view, [(values, Shard(dim))], Shard(dim))


def _searchsorted(view: OpView, parts: int) -> Iterator[OpStrategy]:
    """Rows of values among rows of boundaries, or all values among one row."""
    rows, values, order = map(view.operand, ("sorted_sequence", "self", "sorter"))
    if rows is None or values is None:
        return
    last = len(view.input(values).shape) - 1
    shared = len(view.input(rows).shape) == 1
    for dim in over(view.input(values), parts):
        boundaries = Replicate() if shared or dim == last else Shard(dim)
        reads = [(item, boundaries) for item in (rows, order) if item is not None]
        yield from strategy(view, [(values, Shard(dim)), *reads], Shard(dim))


REDUCTIONS: Table = {
    **for_all("sum count_nonzero", Rule(_sum)),
    "mean": Rule(_sum, _lower_mean),
    **for_all(
        "amax amin aminmax max min argmax argmin prod any all var std var_mean std_mean norm "
        "linalg_vector_norm nansum nanmean median nanmedian mode kthvalue",
        Rule(_reduction),
    ),
    **for_all("cumsum", Rule(_linear_along)),
    **for_all("cumprod cummax cummin logcumsumexp sort argsort topk", Rule(_along)),
    **for_all("fft_fft fft_ifft fft_fftn fft_ifftn fft_fft2 fft_ifft2", Rule(_transform)),
    "bucketize": Rule(_bucketize),
    "searchsorted": Rule(_searchsorted),
}
