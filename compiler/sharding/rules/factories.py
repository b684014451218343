"""Rules of operators that make tensors from scalars: a rank makes its part.

Of a tensor that they are given (`zeros_like`, `new_ones`) they read type and shape alone, so it may
lie in any way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ...ir.mesh import Partial, Placement, Replicate, Shard
from ..lowering import Lowering, Ref
from ..rule import Rule, Table
from ..strategy import OpStrategy, OpView
from .common import broadcast, for_all, is_int, is_sharded, lower_to_size, over, strategy

__all__ = ["FACTORIES"]


def _sized(view: OpView, parts: int) -> Iterator[OpStrategy]:
    """`zeros`, `new_zeros`: any dim of the result, whatever the operand, if there is one."""
    results: list[Placement] = [Replicate(), *map(Shard, over(view.output(), parts))]
    if not view.inputs:
        for result in results:
            yield from strategy(view, [], result)
        return
    for result in results:
        if result != Replicate():
            yield from strategy(view, [], result, full_gradients=(0,))
        reads: list[Placement] = [Partial(), *map(Shard, over(view.input(0), parts))]
        for read in reads:
            yield from strategy(view, [(0, read)], result)


def _like(view: OpView, parts: int) -> Iterator[OpStrategy]:
    """A part like the operand's part."""
    yield from broadcast(view, parts)
    yield from strategy(view, [(0, Partial())], Replicate())


def _arange(view: OpView, parts: int) -> Iterator[OpStrategy]:
    """A part starts further on; only whole numbers, as others would be rounded otherwise."""
    if all(map(is_int, view.node.args)):
        for dim in over(view.output(), parts):
            yield from strategy(view, [], Shard(dim))


def _lower_arange(lowering: Lowering) -> Sequence[Ref]:
    if not is_sharded(lowering):
        return lowering.same()
    (begin,), (count,) = lowering.output_offset(), lowering.output_type().shape
    start, step = lowering.view.argument("start", 0), lowering.view.argument("step", 1)
    assert isinstance(start, int) and isinstance(step, int)
    args = (start + begin * step, start + (begin + count) * step, step)
    return lowering.same(op="aten.arange.start_step", args=args)


FACTORIES: Table = {
    **for_all(
        "zeros ones full empty new_zeros new_ones new_full new_empty", Rule(_sized, lower_to_size)
    ),
    **for_all("zeros_like ones_like full_like empty_like", Rule(_like)),
    "arange": Rule(_arange, _lower_arange),
}
