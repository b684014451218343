"""Rules of matrix products."""

from __future__ import annotations

from .checks import check_rule, one_node, randn, strategy_texts


def test_linear() -> None:
    case = one_node("aten.linear.default", randn(4, 3, 6), randn(5, 6), randn(5))
    assert strategy_texts(case) == [
        "S(0),R,R -> S(0)",
        "S(1),R,R -> S(1)",
        "R,S(0),S(0) -> S(2)",
        "S(2),S(1),R! -> P(sum)",
    ]
    check_rule(case)
    check_rule(one_node("aten.linear.default", randn(4, 6), randn(5, 6)))
