"""Rules of operators that only say otherwise what shape a tensor has: views of all its elements.

All are linear: terms of a sum pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from ...ir.mesh import Replicate, Shard
from ...ir.ops import resolve
from ..labels import call_with
from ..lowering import Lowering, Ref
from ..rule import Rule, Table
from ..strategy import OpStrategy, OpView, can_shard
from .common import broadcast, for_all, linear, lower_to_size, moved, over, strategy

__all__ = ["SHAPES", "dim_groups"]


# -- reshapes --------------------------------------------------------------------------------------


def dim_groups(
    before: Sequence[int], after: Sequence[int]
) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]:
    """How dims of one shape become dims of another of as many elements, in order.

    Each group is (dims before, dims after) of equal product, as small as can be. Dims of size 1 are
    left out, as nothing is said by where they stand.

    >>> dim_groups((4, 6, 10), (24, 2, 1, 5))
    (((0, 1), (0,)), ((2,), (1, 3)))
    """
    olds = [dim for dim, size in enumerate(before) if size != 1]
    news = [dim for dim, size in enumerate(after) if size != 1]
    groups = []
    while olds and news:
        left, right = [olds.pop(0)], [news.pop(0)]
        old, new = before[left[0]], after[right[0]]
        while old != new:
            if old < new:
                left.append(olds.pop(0))
                old *= before[left[-1]]
            else:
                right.append(news.pop(0))
                new *= after[right[-1]]
        groups.append((tuple(left), tuple(right)))
    return tuple(groups)


def _reshape(view: OpView, parts: int) -> Iterator[OpStrategy]:
    """The first dim of a group can be sharded, as parts of it are parts of its group's first dim.

    Where dims merge or split, both first dims must divide, as then parts of one are as long as
    parts of the other.
    """
    if view.argument("dtype") is not None:
        yield from _reinterpreted(view, parts)
        return
    x, result = view.input(0), view.output()
    yield from linear(view, [0])
    if x.numel == 0:
        return
    for olds, news in dim_groups(x.shape, result.shape):
        even = len(olds) + len(news) > 2
        old, new = olds[0], news[0]
        if can_shard(x, old, parts, even=even) and can_shard(result, new, parts, even=even):
            yield from strategy(view, [(0, Shard(old))], Shard(new))


def _reinterpreted(view: OpView, parts: int) -> Iterator[OpStrategy]:
    """`view(dtype)`: the last dim may change its size."""
    rank = len(view.input(0).shape)
    resized = view.input(0).shape != view.output().shape
    yield from moved(view, parts, {dim: dim for dim in range(rank - resized)})


def _lower_reshape(lowering: Lowering) -> Sequence[Ref]:
    if lowering.view.argument("dtype") is not None:
        return lowering.same()
    return lower_to_size(lowering)


def _lower_as_reshape(lowering: Lowering) -> Sequence[Ref]:
    """Told by its arguments, the operator could take a part of size 1 for a dim of size 1."""
    shape = lowering.output_type().shape
    return lowering.same(op="aten.reshape.default", args=(lowering.inputs[0], shape), kwargs=())


# -- permutations ----------------------------------------------------------------------------------


def _permute(view: OpView, parts: int) -> Iterator[OpStrategy]:
    yield from linear(view, [0])
    yield from moved(view, parts, {old: new for new, old in enumerate(_order(view))})


def _order(view: OpView) -> tuple[int, ...]:
    """The dim of the operand that each dim of the result is, seen from what becomes of sizes."""
    rank = len(view.input(0).shape)
    sizes = torch.empty(tuple(range(rank)), device="meta")
    result = resolve(view.node.op)(sizes, *view.node.args[1:], **dict(view.node.kwargs))
    return tuple(int(size) for size in result.shape)


# -- repetitions -----------------------------------------------------------------------------------


def _expand(view: OpView, parts: int) -> Iterator[OpStrategy]:
    """Dims that stay, and dims that are made from size 1, where the operand is whole."""
    x, result = view.input(0), view.output()
    yield from linear(view, [0])
    for dim in over(result, parts):
        old = dim - len(result.shape) + len(x.shape)
        size = x.shape[old] if old >= 0 else 1
        if size in (1, result.shape[dim]):
            yield from strategy(view, [(0, Replicate() if size == 1 else Shard(old))], Shard(dim))


def _lower_repeat(lowering: Lowering) -> Sequence[Ref]:
    """As many repetitions as the local result has of the local operand."""
    x, shape = lowering.type(lowering.inputs[0]).shape, lowering.output_type().shape
    old = (*[1] * (len(shape) - len(x)), *x)
    repeats = tuple(new // max(1, size) for new, size in zip(shape, old, strict=True))
    args = (lowering.inputs[0], repeats)
    return lowering.same(op="aten.repeat.default", args=args, kwargs=())


def _repeat_interleave(view: OpView, parts: int) -> Iterator[OpStrategy]:
    """Repeated elements stay together, so that of even parts each becomes a part."""
    x, dim = view.input(0), view.argument("dim")
    if not isinstance(dim, int) or len(view.inputs) > 1:
        return
    dim %= len(x.shape)
    yield from linear(view, [0])
    others = {d: d for d in range(len(x.shape)) if d != dim}
    yield from moved(view, parts, others)
    if can_shard(x, dim, parts, even=True):
        yield from strategy(view, [(0, Shard(dim))], Shard(dim))


def _lower_repeat_interleave(lowering: Lowering) -> Sequence[Ref]:
    if lowering.view.argument("output_size") is None:
        return lowering.same()
    dim = lowering.view.argument("dim")
    assert isinstance(dim, int)
    return call_with(lowering, {"output_size": lowering.output_type().shape[dim]})


SHAPES: Table = {
    **for_all("view reshape _unsafe_view", Rule(_reshape, _lower_reshape)),
    **for_all("flatten unflatten squeeze unsqueeze ravel", Rule(_reshape, _lower_as_reshape)),
    **for_all(
        "permute transpose t movedim moveaxis swapaxes swapdims mT adjoint numpy_T",
        Rule(_permute),
    ),
    "expand": Rule(_expand, lower_to_size),
    "broadcast_to": Rule(_expand, lower_to_size),
    "broadcast_tensors": Rule(broadcast),
    **for_all("repeat tile", Rule(_expand, _lower_repeat)),
    "repeat_interleave": Rule(_repeat_interleave, _lower_repeat_interleave),
}
