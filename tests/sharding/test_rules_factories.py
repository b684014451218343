"""Rules of factories and of operators that draw random numbers."""

from __future__ import annotations

import pytest
import torch

from .checks import Case, check_rule, one_node, randn, strategy_texts

X = randn(4, 3, 6)
CHANCES = randn(4, 6).sigmoid()

CASES: dict[str, Case] = {
    "zeros": one_node("aten.zeros.default", [4, 6], dtype=torch.float64),
    "full": one_node("aten.full.default", [4, 6], 2.5, dtype=torch.float64),
    "new_ones": one_node("aten.new_ones.default", X, [6, 4], dtype=torch.bool),
    "new_full": one_node("aten.new_full.default", X, [6], 3.0),
    "ones_like": one_node("aten.ones_like.default", X),
    "full_like": one_node("aten.full_like.default", X, 2.5, dtype=torch.int64),
    "arange": one_node("aten.arange.default", 7),
    "arange start": one_node("aten.arange.start", 3, 9, dtype=torch.float64),
    "arange step": one_node("aten.arange.start_step", 9, -2, -2),
    "dropout": one_node("aten.dropout.default", X, 0.4, True),
    "dropout off": one_node("aten.dropout.default", X, 0.4, False),
    "native_dropout": one_node("aten.native_dropout.default", X, 0.4, True),
    "feature_dropout": one_node("aten.feature_dropout.default", X, 0.4, True),
    "alpha_dropout": one_node("aten.alpha_dropout.default", X, 0.4, True),
    "bernoulli": one_node("aten.bernoulli.default", CHANCES, constant=[CHANCES]),
    "bernoulli.p": one_node("aten.bernoulli.p", CHANCES, 0.3, constant=[CHANCES]),
    "rand": one_node("aten.rand.default", [4, 1, 6], dtype=torch.float64),
    "randn": one_node("aten.randn.default", [4, 6], dtype=torch.float64),
    "randint": one_node("aten.randint.low", 2, 90, [4, 6]),
    "rand_like": one_node("aten.rand_like.default", X),
    "normal": one_node("aten.normal.Tensor_float", CHANCES, 2.0, constant=[CHANCES]),
    "normal of size": one_node("aten.normal.float_float", 1.0, 2.0, [4, 6], dtype=torch.float64),
    "rrelu": one_node("aten.rrelu.default", X, 0.1, 0.3, True),
}


@pytest.mark.parametrize("name", CASES)
def test_factories(name: str) -> None:
    assert strategy_texts(CASES[name])
    check_rule(CASES[name])


EXPECTED = {
    "zeros": [" -> S(0)", " -> S(1)"],
    "arange": [" -> S(0)"],
    "new_full": [
        "P(sum) -> R",
        "S(0) -> R",
        "S(1) -> R",
        "S(2) -> R",
        "R! -> S(0)",
        "P(sum) -> S(0)",
        "S(0) -> S(0)",
        "S(1) -> S(0)",
        "S(2) -> S(0)",
    ],
    "rand": [" -> S(0)", " -> S(2)"],
    "native_dropout": [
        "S(0) -> S(0),S(0)",
        "S(1) -> S(1),S(1)",
        "S(2) -> S(2),S(2)",
        "P(sum) -> P(sum),R",
    ],
}


@pytest.mark.parametrize("name", EXPECTED)
def test_strategies(name: str) -> None:
    assert strategy_texts(CASES[name]) == EXPECTED[name]


def test_a_line_of_rounded_steps_is_made_whole() -> None:
    assert not strategy_texts(one_node("aten.arange.start_step", 0, 1.0, 0.1, dtype=torch.float64))
