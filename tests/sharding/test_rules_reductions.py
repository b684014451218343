"""Rules of reductions and of operators that work along a dim."""

from __future__ import annotations

import pytest
import torch

from .checks import Case, check_rule, one_node, randn, strategy_texts

X = randn(4, 3, 6)
INTEGERS = torch.arange(60).view(3, 4, 5) * 7 % 11
ROWS = randn(4, 7).sort().values

CASES: dict[str, Case] = {
    "sum": one_node("aten.sum.default", X),
    "sum dims": one_node("aten.sum.dim_IntList", X, [0, -1], True),
    "sum whole numbers": one_node("aten.sum.dim_IntList", INTEGERS, [0]),
    "count_nonzero": one_node("aten.count_nonzero.dim_IntList", INTEGERS > 5, [1]),
    "mean": one_node("aten.mean.default", randn(4, 5)),
    "mean dims": one_node("aten.mean.dim", randn(4, 5, 3), [1, 0]),
    "mean dim": one_node("aten.mean.dim", randn(4, 5, 3), [-2], True),
    "amax": one_node("aten.amax.default", X, [1]),
    "amin": one_node("aten.amin.default", X, [0, 2], True),
    "max": one_node("aten.max.dim", X, 1),
    "max of all": one_node("aten.max.default", X),
    "min": one_node("aten.min.dim", X, -1, True),
    "argmax": one_node("aten.argmax.default", X, 1),
    "argmax of all": one_node("aten.argmax.default", X),
    "any": one_node("aten.any.dim", INTEGERS > 9, 1),
    "all": one_node("aten.all.dims", INTEGERS > 3, [0, 1]),
    "prod": one_node("aten.prod.dim_int", X, 0),
    "var": one_node("aten.var.correction", X, [1], correction=1, keepdim=True),
    "var of all": one_node("aten.var.correction", X),
    "std": one_node("aten.std.dim", X, [2]),
    "var_mean": one_node("aten.var_mean.correction", X, [0, 2], correction=0),
    "norm": one_node("aten.norm.ScalarOpt_dim", X, 2, [1]),
    "linalg_vector_norm": one_node("aten.linalg_vector_norm.default", X, 2.0, [-1], True),
    "cumsum": one_node("aten.cumsum.default", X, 1),
    "cumprod": one_node("aten.cumprod.default", X, -1),
    "sort": one_node("aten.sort.default", X, 1, True),
    "topk": one_node("aten.topk.default", X, 2, 1),
    "argsort": one_node("aten.argsort.default", X),
    "fft_fftn": one_node("aten.fft_fftn.default", X, None, [1, 2]),
    "bucketize": one_node("aten.bucketize.Tensor", X, ROWS[0]),
    "searchsorted": one_node("aten.searchsorted.Tensor", ROWS, randn(4, 6)),
    "searchsorted one row": one_node("aten.searchsorted.Tensor", ROWS[0], X),
}


@pytest.mark.parametrize("name", CASES)
def test_reductions(name: str) -> None:
    check_rule(CASES[name])


EXPECTED = {
    "sum": ["S(0) -> P(sum)", "S(1) -> P(sum)", "S(2) -> P(sum)", "P(sum) -> P(sum)"],
    "sum dims": ["S(1) -> S(1)", "S(0) -> P(sum)", "S(2) -> P(sum)", "P(sum) -> P(sum)"],
    "sum whole numbers": ["S(1) -> S(0)", "S(2) -> S(1)", "S(0) -> P(sum)"],
    "mean dims": ["S(2) -> S(0)", "S(0) -> P(sum)", "S(1) -> P(sum)", "P(sum) -> P(sum)"],
    "max": ["S(0) -> S(0),S(0)", "S(2) -> S(1),S(1)"],
    "max of all": [],
    "argmax of all": [],
    "var of all": [],
    "all": ["S(2) -> S(0)"],
    "cumsum": ["P(sum) -> P(sum)", "S(0) -> S(0)", "S(2) -> S(2)"],
    "topk": ["S(0) -> S(0),S(0)", "S(2) -> S(2),S(2)"],
    "fft_fftn": ["S(0) -> S(0)"],
    "searchsorted": ["S(0),S(0) -> S(0)", "R,S(1) -> S(1)"],
}


@pytest.mark.parametrize("name", EXPECTED)
def test_strategies(name: str) -> None:
    assert strategy_texts(CASES[name]) == EXPECTED[name]
