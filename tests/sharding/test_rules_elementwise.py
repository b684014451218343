"""Rules of operators that work element by element."""

from __future__ import annotations

import pytest
import torch

from .checks import Case, check_rule, one_node, randn, strategy_texts

X = randn(4, 3, 6)
POSITIVE = randn(4, 3, 6).abs() + 0.5
CHOICE = randn(4, 1, 6) > 0

UNARY = (
    "abs exp expm1 square relu gelu silu sigmoid tanh softplus elu leaky_relu hardtanh hardswish "
    "hardsigmoid mish relu6 selu celu sin cos erf floor sign log_sigmoid nan_to_num softshrink "
    "hardshrink isnan neg clone alias detach logical_not positive"
)
POSITIVE_ONLY = "log log1p log2 log10 sqrt rsqrt reciprocal lgamma"
BINARY = (
    "add.Tensor sub.Tensor mul.Tensor div.Tensor minimum.default maximum.default atan2.default "
    "eq.Tensor lt.Tensor rsub.Tensor fmod.Tensor max.other min.other"
)


@pytest.mark.parametrize("packet", UNARY.split())
def test_unary(packet: str) -> None:
    case = one_node(f"aten.{packet}.default", X)
    assert strategy_texts(case)[:3] == ["S(0) -> S(0)", "S(1) -> S(1)", "S(2) -> S(2)"]
    check_rule(case)


@pytest.mark.parametrize("packet", POSITIVE_ONLY.split())
def test_unary_of_positive_numbers(packet: str) -> None:
    check_rule(one_node(f"aten.{packet}.default", POSITIVE), parts=(2,), pairs=False)


@pytest.mark.parametrize("op", BINARY.split())
def test_binary(op: str) -> None:
    case = one_node(f"aten.{op}", X, POSITIVE.clone())
    assert "S(2),S(2) -> S(2)" in strategy_texts(case)
    check_rule(case)


def test_what_an_operand_lacks_or_has_once_is_whole() -> None:
    case = one_node("aten.mul.Tensor", randn(4, 1, 6), randn(3, 1))
    assert strategy_texts(case) == [
        "S(0),R -> S(0)",
        "R,S(0) -> S(1)",
        "S(2),R -> S(2)",
        "P(sum),R -> P(sum)",
        "R,P(sum) -> P(sum)",
    ]
    check_rule(case)


def test_a_dim_shorter_than_the_axis_is_whole() -> None:
    case = one_node("aten.relu.default", randn(3, 4))
    assert strategy_texts(case, 3) == ["S(0) -> S(0)"], "four in parts of two: the third is empty"


def test_a_whole_term_is_added_once() -> None:
    case = one_node("aten.add.Tensor", X, randn(6), alpha=3)
    texts = strategy_texts(case)
    assert "P(sum),P(sum) -> P(sum)" in texts
    assert "P(sum),R! -> P(sum)" in texts and "R!,P(sum) -> P(sum)" in texts
    check_rule(case)


def test_a_number_cannot_be_added_to_terms() -> None:
    for op in ("aten.add.Tensor", "aten.rsub.Scalar"):
        assert not any("P(" in text for text in strategy_texts(one_node(op, X, 2.0)))
    scaled = one_node("aten.div.Tensor", X, 2.0)
    assert "P(sum) -> P(sum)" in strategy_texts(scaled)
    check_rule(scaled)


def test_one_tensor_twice() -> None:
    product, total = (one_node(f"aten.{name}.Tensor", X, X) for name in ("mul", "add"))
    assert "P(sum) -> P(sum)" not in strategy_texts(product)
    assert "P(sum) -> P(sum)" in strategy_texts(total)
    check_rule(product)
    check_rule(total)


CASES: dict[str, Case] = {
    "where": one_node("aten.where.self", CHOICE, X, randn(1, 3, 1)),
    "where zero": one_node("aten.where.ScalarOther", CHOICE, X, 0.0),
    "where number": one_node("aten.where.ScalarOther", CHOICE, X, -1e9),
    "where zero first": one_node("aten.where.ScalarSelf", CHOICE, 0, X),
    "where numbers": one_node("aten.where.Scalar", CHOICE, 0, 0),
    "masked_fill": one_node("aten.masked_fill.Scalar", X, CHOICE, 0),
    "masked_fill number": one_node("aten.masked_fill.Scalar", X, CHOICE, 1.5),
    "masked_fill tensor": one_node("aten.masked_fill.Tensor", X, CHOICE, randn()),
    "clamp": one_node("aten.clamp.default", X, -0.5, 0.5),
    "clamp tensors": one_node("aten.clamp.Tensor", X, randn(6) - 1, randn(3, 6) + 1),
    "pow": one_node("aten.pow.Tensor_Scalar", X, 3),
    "pow of": one_node("aten.pow.Scalar", 2.0, X),
    "pow tensors": one_node("aten.pow.Tensor_Tensor", POSITIVE, randn(6)),
    "addcmul": one_node("aten.addcmul.default", X, randn(6), randn(4, 1, 1), value=2.0),
    "lerp": one_node("aten.lerp.Tensor", X, randn(4, 3, 6).sin(), randn(6)),
    "and": one_node("aten.__and__.Tensor", CHOICE, X > 0),
    "compare": one_node("aten.ge.Scalar", X, 0.25),
    "cast": one_node("aten._to_copy.default", X, dtype=torch.float64),
    "cast up": one_node("aten._to_copy.default", X > 0, dtype=torch.float64),
    "prelu": one_node("aten.prelu.default", X, randn(3)),
    "prelu of one": one_node("aten.prelu.default", X, randn(1)),
    "glu": one_node("aten.glu.default", X, -1),
    "threshold": one_node("aten.threshold.default", X, 0.1, 0.0),
    "complex": one_node("aten.view_as_complex.default", randn(4, 6, 2)),
    "pairs": one_node("aten.view_as_real.default", torch.complex(randn(4, 6), randn(6, 4).t())),
    "polar": one_node("aten.polar.default", POSITIVE, X),
    "fill": one_node("aten.fill.Tensor", X, randn()),
    "round": one_node("aten.div.Tensor_mode", X, POSITIVE, rounding_mode="floor"),
    "type_as": one_node("aten.type_as.default", X, randn(6, 4)),
}


@pytest.mark.parametrize("name", CASES)
def test_elementwise(name: str) -> None:
    assert strategy_texts(CASES[name])
    check_rule(CASES[name])


def test_terms_pass_only_what_is_linear() -> None:
    passing = {name for name, case in CASES.items() if "P(sum)" in " ".join(strategy_texts(case))}
    assert passing == {
        "where",
        "where zero",
        "where zero first",
        "masked_fill",
        "masked_fill tensor",
        "cast",
    }


def test_gated_halves_stay_together() -> None:
    assert strategy_texts(CASES["glu"]) == ["S(0) -> S(0)", "S(1) -> S(1)"]


def test_the_other_tensor_of_a_cast_may_lie_anyhow() -> None:
    assert {"S(0),R -> S(0)", "S(0),S(1) -> S(0)", "R!,S(0) -> R"} <= set(
        strategy_texts(CASES["type_as"])
    )
