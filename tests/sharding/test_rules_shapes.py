"""Rules of views and of operators that cut and join."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cutset.compiler.sharding.rules.shapes import dim_groups

from .checks import Case, check_rule, one_node, randn, strategy_texts

X = randn(4, 3, 6)

CASES: dict[str, Case] = {
    "view heads": one_node("aten.view.default", randn(2, 4, 12), [2, 4, 4, 3]),
    "view heads apart": one_node("aten.view.default", randn(2, 4, 12), [2, -1, 6, 2]),
    "view heads back": one_node("aten.reshape.default", randn(2, 4, 6, 2), [2, 4, 12]),
    "flatten rows": one_node("aten._unsafe_view.default", randn(4, 3, 5), [-1, 5]),
    "view regrouped": one_node("aten.view.default", randn(6, 4), [4, 6]),
    "view scalar": one_node("aten.view.default", randn(1, 1), []),
    "view bits": one_node("aten.view.dtype", X, torch.int64),
    "view half bits": one_node("aten.view.dtype", X, torch.int32),
    "flatten": one_node("aten.flatten.using_ints", X, 0, 1),
    "unflatten": one_node("aten.unflatten.int", randn(3, 12), 1, [6, -1]),
    "unsqueeze": one_node("aten.unsqueeze.default", X, -2),
    "squeeze": one_node("aten.squeeze.default", randn(2, 1, 3)),
    "squeeze dim": one_node("aten.squeeze.dim", randn(2, 1, 3), 1),
    "squeeze dims": one_node("aten.squeeze.dims", randn(2, 1, 3, 1), [0, 1, -1]),
    "permute": one_node("aten.permute.default", X, [2, 0, -2]),
    "transpose": one_node("aten.transpose.int", X, -1, 0),
    "t": one_node("aten.t.default", randn(4, 6)),
    "movedim": one_node("aten.movedim.int", X, 0, -1),
    "swapaxes": one_node("aten.swapaxes.default", X, 0, 1),
    "expand": one_node("aten.expand.default", randn(1, 3, 1), [4, -1, 6]),
    "expand in front": one_node("aten.expand.default", randn(3, 1), [4, 3, 6]),
    "broadcast_tensors": one_node("aten.broadcast_tensors.default", [randn(4, 1), randn(3, 1, 6)]),
    "repeat": one_node("aten.repeat.default", randn(1, 3, 2), [4, 1, 3]),
    "repeat in front": one_node("aten.repeat.default", randn(3, 1), [4, 1, 6]),
    "tile": one_node("aten.tile.default", randn(4, 3), [2]),
    "repeat_interleave": one_node("aten.repeat_interleave.self_int", X, 2, 0, output_size=8),
    "repeat_interleave last": one_node("aten.repeat_interleave.self_int", X, 3, -1),
    "slice": one_node("aten.slice.Tensor", X, 1, 1, 9223372036854775807),
    "slice all": one_node("aten.slice.Tensor", X, 0, 0, 4),
    "slice steps": one_node("aten.slice.Tensor", X, 2, 0, 6, 2),
    "narrow": one_node("aten.narrow.default", X, 1, 0, 3),
    "select": one_node("aten.select.int", X, 1, -1),
    "diagonal": one_node("aten.diagonal.default", randn(4, 6, 4), 0, 0, -1),
    "split": one_node("aten.split.Tensor", X, 4, -1),
    "split_with_sizes": one_node("aten.split_with_sizes.default", X, [1, 2], 1),
    "chunk": one_node("aten.chunk.default", X, 2, 0),
    "unbind": one_node("aten.unbind.int", X, 1),
    "flip": one_node("aten.flip.default", X, [-1]),
    "roll": one_node("aten.roll.default", X, [1, 2], [1, -1]),
    "roll flat": one_node("aten.roll.default", X, [2]),
    "triu": one_node("aten.triu.default", X, 1),
    "reflection_pad2d": one_node("aten.reflection_pad2d.default", X, [0, 0, 1, 2]),
    "replication_pad1d": one_node("aten.replication_pad1d.default", X, [1, 2]),
    "cat": one_node("aten.cat.default", [X, randn(4, 2, 6), X], 1),
    "cat to nothing": one_node("aten.cat.default", [randn(0), X], 1),
    "stack": one_node("aten.stack.default", [X, randn(4, 3, 6).sin()], -2),
    "select_scatter": one_node("aten.select_scatter.default", X, randn(4, 6), 1, 2),
    "slice_scatter": one_node("aten.slice_scatter.default", X, randn(4, 3, 2), 2, 1, 3),
    "diff": one_node("aten.diff.default", X, 1, -1, randn(4, 3, 1)),
}


@pytest.mark.parametrize("name", CASES)
def test_shapes(name: str) -> None:
    check_rule(CASES[name])


EXPECTED = {
    "view heads": ["P(sum) -> P(sum)", "S(0) -> S(0)", "S(1) -> S(1)", "S(2) -> S(2)"],
    "view heads back": ["P(sum) -> P(sum)", "S(0) -> S(0)", "S(1) -> S(1)", "S(2) -> S(2)"],
    "flatten rows": ["P(sum) -> P(sum)", "S(0) -> S(0)", "S(2) -> S(1)"],
    "view regrouped": ["P(sum) -> P(sum)", "S(0) -> S(0)"],
    "expand": ["P(sum) -> P(sum)", "R -> S(0)", "S(1) -> S(1)", "R -> S(2)"],
    "repeat": ["P(sum) -> P(sum)", "R -> S(0)", "S(1) -> S(1)"],
    "slice all": ["P(sum) -> P(sum)", "S(0) -> S(0)", "S(1) -> S(1)", "S(2) -> S(2)"],
    "slice": ["P(sum) -> P(sum)", "S(0) -> S(0)", "S(2) -> S(2)"],
    "select": ["P(sum) -> P(sum)", "S(0) -> S(0)", "S(2) -> S(1)"],
    "roll flat": ["P(sum) -> P(sum)"],
    "split": ["P(sum) -> P(sum),P(sum)", "S(0) -> S(0),S(0)", "S(1) -> S(1),S(1)"],
    "stack": [
        "P(sum),P(sum) -> P(sum)",
        "S(0),S(0) -> S(0)",
        "S(1),S(1) -> S(1)",
        "S(2),S(2) -> S(3)",
    ],
}


@pytest.mark.parametrize("name", EXPECTED)
def test_strategies(name: str) -> None:
    assert strategy_texts(CASES[name]) == EXPECTED[name]


def test_merged_dims_are_sharded_only_evenly() -> None:
    uneven = one_node("aten.view.default", randn(3, 4), [12])
    assert strategy_texts(uneven) == ["P(sum) -> P(sum)"]
    alone = one_node("aten.view.default", randn(3, 4), [3, 2, 2])
    assert strategy_texts(alone)[1:] == ["S(0) -> S(0)", "S(1) -> S(1)"]


@given(st.lists(st.integers(1, 4), max_size=5), st.data())
def test_groups_cover_all_dims_in_order_and_are_of_equal_size(
    before: list[int], data: st.DataObject
) -> None:
    factors = [f for size in before for f in ([2, 2] if size == 4 else [size])]
    after, start = [], 0
    while start < len(factors):
        stop = data.draw(st.integers(start + 1, len(factors)))
        after.append(math.prod(factors[start:stop]))
        start = stop
    groups = dim_groups(before, after)
    assert [d for old, _ in groups for d in old] == [d for d, n in enumerate(before) if n > 1]
    assert [d for _, new in groups for d in new] == [d for d, n in enumerate(after) if n > 1]
    for old, new in groups:
        assert math.prod(before[d] for d in old) == math.prod(after[d] for d in new)
