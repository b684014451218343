"""Rules of matrix products."""

from __future__ import annotations

import pytest

from .checks import Case, check_rule, one_node, randn, strategy_texts

SQUARE = randn(4, 4)


def test_linear() -> None:
    case = one_node("aten.linear.default", randn(4, 3, 6), randn(5, 6), randn(5))
    assert strategy_texts(case) == [
        "S(0),R,R -> S(0)",
        "S(1),R,R -> S(1)",
        "R,S(0),S(0) -> S(2)",
        "S(2),S(1),R! -> P(sum)",
        "P(sum),R,R! -> P(sum)",
    ]
    check_rule(case)
    check_rule(one_node("aten.linear.default", randn(4, 6), randn(5, 6)))
    check_rule(one_node("aten.linear.default", randn(6), randn(5, 6), randn(5)))


def test_matmul_splits_rows_columns_and_the_sum() -> None:
    case = one_node("aten.matmul.default", randn(4, 6), randn(6, 5))
    assert strategy_texts(case) == [
        "S(0),R -> S(0)",
        "R,S(1) -> S(1)",
        "S(1),S(0) -> P(sum)",
        "P(sum),R -> P(sum)",
        "R,P(sum) -> P(sum)",
    ]


def test_matmul_of_a_tensor_with_itself_keeps_what_both_sides_agree_on() -> None:
    x = randn(4, 5, 5)
    case = one_node("aten.matmul.default", x, x)
    assert strategy_texts(case) == ["S(0) -> S(0)"]
    check_rule(case)


PRODUCTS = {
    "matmul rank 1 1": (randn(6), randn(6)),
    "matmul rank 1 2": (randn(6), randn(6, 4)),
    "matmul rank 2 1": (randn(4, 6), randn(6)),
    "matmul rank 3 1": (randn(3, 4, 6), randn(6)),
    "matmul rank 1 3": (randn(6), randn(3, 6, 4)),
    "matmul rank 3 2": (randn(3, 4, 6), randn(6, 5)),
    "matmul rank 2 3": (randn(4, 6), randn(3, 6, 5)),
    "matmul rank 4 4": (randn(2, 3, 4, 5), randn(2, 3, 5, 4)),
    "matmul broadcast": (randn(3, 1, 4, 6), randn(1, 4, 6, 2)),
    "matmul broadcast ranks": (randn(3, 2, 4, 6), randn(2, 6, 1)),
    "mm": (randn(4, 6), randn(6, 5)),
    "bmm": (randn(4, 3, 6), randn(4, 6, 5)),
    "mv": (randn(4, 6), randn(6)),
    "dot": (randn(6), randn(6)),
    "outer": (randn(4), randn(6)),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products(name: str) -> None:
    check_rule(one_node(f"aten.{name.split()[0]}.default", *PRODUCTS[name]))


@pytest.mark.parametrize("shape", [(5,), (1,), (4, 5), (1, 5), (4, 1), ()])
def test_addmm(shape: tuple[int, ...]) -> None:
    case = one_node(
        "aten.addmm.default", randn(*shape), randn(4, 6), randn(6, 5), beta=0.5, alpha=2
    )
    assert "R!,S(1),S(0) -> P(sum)" in strategy_texts(case)
    check_rule(case)


@pytest.mark.parametrize("shape", [(4, 3, 5), (3, 5), (4, 1, 1)])
def test_baddbmm(shape: tuple[int, ...]) -> None:
    added, left, right = randn(*shape), randn(4, 3, 6), randn(4, 6, 5)
    check_rule(one_node("aten.baddbmm.default", added, left, right, alpha=0.25))


def einsum(equation: str, *shapes: tuple[int, ...]) -> Case:
    return one_node("aten.einsum.default", equation, [randn(*shape) for shape in shapes])


def test_einsum() -> None:
    case = einsum("bind,bjnd->bnij", (4, 6, 2, 3), (4, 5, 2, 3))
    assert strategy_texts(case) == [
        "S(0),S(0) -> S(0)",
        "S(2),S(2) -> S(1)",
        "S(1),R -> S(2)",
        "R,S(1) -> S(3)",
        "S(3),S(3) -> P(sum)",
        "P(sum),R -> P(sum)",
        "R,P(sum) -> P(sum)",
    ]
    check_rule(case)
    check_rule(einsum("ibh,hnd->ibnd", (4, 2, 6), (6, 3, 2)))
    check_rule(einsum("ij,jk", (4, 6), (6, 3)))
    check_rule(einsum("i,j,ij->i", (4,), (3,), (4, 3)))


def test_einsum_with_unnamed_or_repeated_dims_is_not_split_there() -> None:
    assert strategy_texts(einsum("...i,ij->...j", (4, 6), (6, 3))) == []
    assert strategy_texts(einsum("ii,ij->j", (4, 4), (4, 3))) == [
        "R,S(1) -> S(0)",
        "P(sum),R -> P(sum)",
        "R,P(sum) -> P(sum)",
    ]
