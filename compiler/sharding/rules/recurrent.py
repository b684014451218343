"""Rules of recurrent layers: rows of a batch on their own, as a step needs all of the last one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ...ir.graph import operands
from ...ir.mesh import Shard
from ..labels import call_with
from ..lowering import Lowering, Ref
from ..rule import Rule, Table
from ..strategy import OpStrategy, OpView, can_shard
from .common import for_all, is_sharded, strategy

__all__ = ["RECURRENT"]


def _rows(view: OpView) -> int:
    """The dim of the input and of the result that is the batch; in states it is dim 1."""
    return 0 if view.argument("batch_first") else 1


def _recurrent(view: OpView, parts: int) -> Iterator[OpStrategy]:
    if not view.node.op.name.endswith(".input"):
        return  # packed sequences: which row a line belongs to depends on values
    batch = _rows(view)
    if can_shard(view.input(0), batch, parts):
        states = [(item.index, Shard(1)) for item in operands(view.argument("hx"))]
        results = [Shard(batch), *[Shard(1)] * (len(view.outputs) - 1)]
        yield from strategy(view, [(0, Shard(batch)), *states], results)


def _lower(lowering: Lowering) -> Sequence[Ref]:
    """Dropout between layers draws for [steps, rows, features]."""
    if lowering.node.random_draw is None or not is_sharded(lowering):
        return lowering.same()
    batch = _rows(lowering.view)
    shape, offset = lowering.view.output().shape, lowering.output_offset()
    window = (shape[1 - batch], shape[batch], shape[2]), (0, offset[batch], 0)
    return call_with(lowering, {"window": window})


RECURRENT: Table = {**for_all("lstm gru rnn_tanh rnn_relu", Rule(_recurrent, _lower))}
