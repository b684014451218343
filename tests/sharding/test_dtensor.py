"""DTensor's rules as a second opinion, for operators that both know.

They are private to torch: where this build keeps them elsewhere, nothing is compared.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cutset.compiler.ir.mesh import Partial, Placement, Replicate, Shard
from cutset.compiler.sharding.rules import strategies_of

from .checks import Case, one_node, randn

Row = tuple[Placement, ...]
"""Placements of results, then of operands."""

CASES: dict[str, tuple[Any, ...]] = {
    "mm": (randn(4, 6), randn(6, 8)),
    "bmm": (randn(4, 4, 6), randn(4, 6, 8)),
    "addmm": (randn(8), randn(4, 6), randn(6, 8)),
    "baddbmm": (randn(4, 4, 8), randn(4, 4, 6), randn(4, 6, 8)),
    "native_layer_norm": (randn(4, 2, 6), [6], randn(6), randn(6), 1e-5),
    "embedding": (randn(8, 4), torch.zeros(4, 2, dtype=torch.int64)),
    "constant_pad_nd": (randn(4, 6, 2), [0, 0, 1, 1], 0),
    "convolution": (randn(4, 2, 8), randn(6, 2, 3), randn(6), [1], [0], [1], False, [0], 1),
}
OURS_ALONE = {"convolution": 3}
"""Strategies that DTensor does not have: channels of convolutions, and their terms."""


def theirs(case: Case, args: tuple[Any, ...]) -> set[Row]:
    """What DTensor has, of the placements that we have."""
    tensor = pytest.importorskip("torch.distributed.tensor")
    specs = pytest.importorskip("torch.distributed.tensor._dtensor_spec")
    dispatcher = getattr(tensor.DTensor, "_op_dispatcher", None)
    propagator = getattr(dispatcher, "sharding_propagator", None)
    table = getattr(propagator, "op_single_dim_strategy_funcs", {})
    op = getattr(torch.ops.aten, case.node.op.packet).default
    function = getattr(table.get(op), "func", None)
    if function is None:
        pytest.skip(f"torch {torch.__version__} has no one-axis strategies of {op}")

    def meta(item: Any) -> Any:
        if not isinstance(item, Tensor):
            return item
        return specs.TensorMeta(item.shape, item.stride(), item.dtype)

    rows = [
        tuple(_translated(item) for item in row if item is not None)
        for row in function(op, tuple(map(meta, args)), {})
    ]
    return {row for row in rows if None not in row}  # type: ignore[misc]


def _translated(item: Any) -> Placement | None:
    kind = type(item).__name__
    if kind in ("Shard", "_ShardingPlaceholder"):
        return Shard(item.dim)
    if kind == "Replicate":
        return Replicate()
    if kind == "_MaskPartial":
        return Partial()
    return Partial() if kind == "Partial" and item.reduce_op == "sum" else None


def ours(case: Case) -> set[Row]:
    """As DTensor counts: what is added on one rank only is Partial, and ids that are looked up in
    a part of the table carry its mask."""
    rows = set()
    for strategy in strategies_of(case.graph, case.node, 2)[1:]:
        inputs = list(strategy.inputs)
        for position in strategy.full_gradients:
            inputs[position] = Partial()
        if case.node.op.packet == "embedding" and strategy.outputs == (Partial(),):
            inputs[1] = Partial()
        rows.add((*strategy.outputs, *inputs))
    return rows


@pytest.mark.parametrize("packet", CASES)
def test_dtensor_has_the_same_strategies(packet: str) -> None:
    case = one_node(f"aten.{packet}.default", *CASES[packet])
    mine, other = ours(case), theirs(case, CASES[packet])
    assert other - mine == set()
    assert len(mine - other) == OURS_ALONE.get(packet, 0), mine - other
