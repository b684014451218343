"""Rules of normalizations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from cutset.compiler.ir.mesh import Mesh
from cutset.compiler.sharding.rules import strategies_of

from .checks import Case, check_rule, collectives, one_node, randn, strategy_texts


def test_layer_norm() -> None:
    case = one_node("aten.layer_norm.default", randn(4, 3, 6), [6], randn(6), randn(6))
    assert strategy_texts(case) == ["S(0),R,R -> S(0)", "S(1),R,R -> S(1)"]
    check_rule(case)
    check_rule(one_node("aten.layer_norm.default", randn(4, 3, 6), [3, 6]))
    check_rule(one_node("aten.layer_norm.default", randn(4, 3, 6), [6], randn(6)))


def test_native_layer_norm_has_three_results() -> None:
    case = one_node("aten.native_layer_norm.default", randn(4, 3, 6), [6], randn(6), randn(6), 1e-5)
    assert strategy_texts(case)[0] == "S(0),R,R -> S(0),S(0),S(0)"
    check_rule(case)


def test_rms_norm() -> None:
    check_rule(one_node("aten.rms_norm.default", randn(4, 3, 6), [6], randn(6), 1e-6))
    check_rule(one_node("aten.rms_norm.default", randn(4, 3, 6), [6]))


def test_group_norm_splits_whole_groups() -> None:
    case = one_node("aten.group_norm.default", randn(3, 8, 2, 2), 4, randn(8), randn(8))
    assert strategy_texts(case, 2) == ["S(0),R,R -> S(0)", "S(1),S(0),S(0) -> S(1)"]
    assert strategy_texts(case, 3) == ["S(0),R,R -> S(0)"]
    assert strategy_texts(case, 8) == []
    check_rule(case, parts=(2, 3, 4))
    check_rule(one_node("aten.group_norm.default", randn(4, 6, 3), 6))


def test_instance_norm() -> None:
    x, weight, bias = randn(4, 6, 5), randn(6), randn(6)
    tail: tuple[Any, ...] = (None, None, True, 0.1, 1e-5, False)
    case = one_node("aten.instance_norm.default", x, weight, bias, *tail)
    assert len(strategy_texts(case)) == 2
    check_rule(case)


# -- batch normalization ---------------------------------------------------------------------------


def batch_norm(op: str, shape: Sequence[int], *rest: Any, affine: bool = True) -> Case:
    channels = shape[1]
    x = 2.0 * randn(*shape) + 5.0
    affines = (randn(channels), randn(channels)) if affine else (None, None)
    running = (randn(channels), torch.rand(channels, dtype=torch.float64) + 0.5)
    stats = () if "no_stats" in op else running
    return one_node(f"aten.{op}", x, *affines, *stats, *rest, constant=running)


FUNCTIONAL = "_native_batch_norm_legit_functional.default"


@pytest.mark.parametrize("shape", [(5, 6), (4, 6, 3), (4, 6, 2, 3)])
@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_in_training(shape: tuple[int, ...], affine: bool) -> None:
    case = batch_norm(FUNCTIONAL, shape, True, 0.1, 1e-5, affine=affine)
    if affine:
        assert "S(0),R,R,R,R -> S(0),R,R,R,R" in strategy_texts(case)
        assert "S(1),S(0),S(0),S(0),S(0) -> S(1),S(0),S(0),S(0),S(0)" in strategy_texts(case)
    check_rule(case)


def test_batch_norm_of_large_means_does_not_cancel() -> None:
    x = randn(6, 4, 3) * 1e-3 + 1e4
    running = torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    case = one_node(
        f"aten.{FUNCTIONAL}", x, None, None, *running, True, 0.1, 1e-12, constant=running
    )
    check_rule(case, relative_error=1e-7)  # one pass would lose 14 digits of 16


def test_batch_norm_in_evaluation_needs_no_collective() -> None:
    case = batch_norm(FUNCTIONAL, (4, 6, 3), False, 0.1, 1e-5)
    check_rule(case)
    for strategy in strategies_of(case.graph, case.node, 2):
        assert collectives(case, (strategy,), Mesh.parse("tensor=2")) == []
    check_rule(batch_norm("_native_batch_norm_legit_no_training.default", (4, 6, 3), 0.1, 1e-5))
    check_rule(batch_norm("batch_norm.default", (4, 6, 3), False, 0.1, 1e-5, False))


def test_batch_norm_without_running_statistics() -> None:
    op = "_native_batch_norm_legit.no_stats"
    check_rule(batch_norm(op, (4, 6, 3), True, 0.1, 1e-5))
    check_rule(batch_norm(op, (1, 6, 4), True, 0.0, 1e-8, affine=False))


def test_batch_norm_that_updates_in_place_is_not_split() -> None:
    case = batch_norm("batch_norm.default", (4, 6, 3), True, 0.1, 1e-5, False)
    assert strategy_texts(case) == []
