"""Rules of operators that read and write where index tensors say."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from cutset.compiler.ir.graph import Graph, Node, Operand, Value, ValueKind
from cutset.compiler.ir.ops import op_named
from cutset.compiler.ir.types import TensorType

from .checks import Case, check_rule, one_node, randn, strategy_texts

X = randn(4, 3, 6)


def whole_numbers(below: int, *shape: int) -> Tensor:
    """Indices without order, each of them several times."""
    return (torch.arange(torch.Size(shape).numel()) * 7 + 3).remainder(below).view(shape)


SOME = whole_numbers(3, 4, 5)

CASES: dict[str, Case] = {
    "index_select": one_node("aten.index_select.default", X, 1, whole_numbers(3, 6)),
    "gather": one_node("aten.gather.default", X, 1, whole_numbers(3, 4, 6, 6)),
    "gather some": one_node("aten.gather.default", X, -1, whole_numbers(6, 3, 3, 2)),
    "take_along_dim": one_node("aten.take_along_dim.default", X, whole_numbers(6, 4, 3, 4), 2),
    "scatter": one_node(
        "aten.scatter.src", X, 1, torch.arange(3).view(1, 3, 1).expand(4, 3, 6), randn(4, 3, 6)
    ),
    "scatter value": one_node("aten.scatter.value", X, 1, whole_numbers(3, 4, 1, 6), 2.0),
    "scatter_add": one_node(
        "aten.scatter_add.default", X, 0, whole_numbers(4, 5, 3, 6), randn(5, 3, 6)
    ),
    "scatter_reduce": one_node(
        "aten.scatter_reduce.two", X, 1, whole_numbers(3, 4, 2, 6), randn(4, 2, 6), "sum"
    ),
    "index_add": one_node("aten.index_add.default", X, 1, whole_numbers(3, 5), randn(4, 5, 6)),
    "index_copy": one_node("aten.index_copy.default", X, 1, torch.tensor([2, 0]), randn(4, 2, 6)),
    "index_fill": one_node("aten.index_fill.int_Scalar", X, 1, torch.tensor([2, 0]), 1.0),
    "one_hot": one_node("aten.one_hot.default", SOME, 3),
    "index rows": one_node("aten.index.Tensor", X, [SOME]),
    "index middle": one_node("aten.index.Tensor", X, [None, SOME]),
    "index last": one_node("aten.index.Tensor", X, [None, None, whole_numbers(6, 2)]),
    "index pairs": one_node(
        "aten.index.Tensor", X, [whole_numbers(4, 5, 1), whole_numbers(3, 1, 6)]
    ),
    "index apart": one_node("aten.index.Tensor", X, [SOME, None, whole_numbers(6, 5)]),
    "index twice": one_node("aten.index.Tensor", X, [SOME, SOME]),
    "index_put": one_node(
        "aten.index_put.default", X, [None, torch.tensor([2, 0])], randn(4, 2, 6)
    ),
    "index_put sum": one_node(
        "aten.index_put.default", X, [whole_numbers(4, 5), None], randn(3, 6), True
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_indexing(name: str) -> None:
    assert strategy_texts(CASES[name])
    check_rule(CASES[name])


EXPECTED = {
    "index_select": [
        "P(sum),R -> P(sum)",
        "S(0),R -> S(0)",
        "S(2),R -> S(2)",
        "R,S(0) -> S(1)",
    ],
    "gather some": ["P(sum),R -> P(sum)", "S(1),S(1) -> S(1)", "R,S(2) -> S(2)"],
    "scatter value": ["S(0),S(0) -> S(0)", "S(2),S(2) -> S(2)"],
    "index middle": [
        "P(sum),R -> P(sum)",
        "S(0),R -> S(0)",
        "S(2),R -> S(3)",
        "R,S(0) -> S(1)",
        "R,S(1) -> S(2)",
    ],
    "index apart": [
        "P(sum),R,R -> P(sum)",
        "S(1),R,R -> S(2)",
        "R,S(0),R -> S(0)",
        "R,S(1),S(0) -> S(1)",
    ],
}


@pytest.mark.parametrize("name", EXPECTED)
def test_strategies(name: str) -> None:
    assert strategy_texts(CASES[name]) == EXPECTED[name]


def test_masks_are_not_indexed_with_on_parts() -> None:
    mask = torch.tensor([True, False, True, True])
    assert not strategy_texts(one_node("aten.index.Tensor", X, [mask]))


def counted(case: Case, position: int, bounds: Sequence[int]) -> Case:
    """The case with input `position` made by `arange(*bounds)` and a view, and not given.

    Strategies are read from this graph; the tensors are those of the case.
    """
    value = case.graph.values[position]
    number = len(case.graph.values)
    line = Value(number, "line", TensorType((value.type.numel,), torch.int64), ValueKind.RESULT)
    overload = ["default", "start", "start_step"][len(bounds) - 1]
    count = Node(1, "line", op_named(f"aten.arange.{overload}"), (), tuple(bounds), (), (number,))
    shaped = Node(
        2,
        "shaped",
        op_named("aten.view.default"),
        (number,),
        (Operand(0), value.type.shape),
        (),
        (position,),
    )
    graph = Graph(
        "case",
        case.graph.mode,
        (*case.graph.values, line),
        (case.node, count, shaped),
        case.graph.inputs,
        (),
    )
    return Case(graph, case.tensors)


ROW_NUMBERS = torch.arange(4).view(4, 1)


def test_rows_that_point_into_their_own_row() -> None:
    picked = one_node("aten.index.Tensor", X, [ROW_NUMBERS, SOME])
    assert not any(text.startswith("S(0),S(0)") for text in strategy_texts(picked))
    case = counted(picked, 1, [4])
    assert "S(0),S(0),S(0) -> S(0)" in strategy_texts(case)
    check_rule(case)
    mask = one_node(
        "aten.index.Tensor",
        randn(4, 6) > 0,
        [ROW_NUMBERS.view(4, 1, 1, 1), torch.arange(6).view(1, 1, 1, 6)],
    )
    check_rule(counted(mask, 1, [0, 4]))


@pytest.mark.parametrize("bounds", [[1, 5], [0, 8, 2]])
def test_other_numbers_are_no_row_numbers(bounds: list[int]) -> None:
    case = counted(one_node("aten.index.Tensor", X, [ROW_NUMBERS, SOME]), 1, bounds)
    assert "S(0),S(0),S(0) -> S(0)" not in strategy_texts(case)


def test_row_numbers_of_a_shorter_dim_are_none() -> None:
    case = counted(one_node("aten.index.Tensor", randn(5, 3), [ROW_NUMBERS, SOME]), 1, [4])
    assert "S(0),S(0),S(0) -> S(0)" not in strategy_texts(case)


def test_rows_written_into_their_own_row() -> None:
    places = torch.tensor([[0, 2], [1, 0], [2, 1], [0, 1]])
    put = one_node("aten.index_put.default", X, [ROW_NUMBERS, places], randn(4, 2, 6))
    case = counted(put, 1, [4])
    assert "S(0),S(0),S(0),S(0) -> S(0)" in strategy_texts(case)
    check_rule(case)
