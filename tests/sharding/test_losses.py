"""Rules of softmax and losses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cutset.compiler.ir.mesh import Mesh
from cutset.compiler.sharding.rules import strategies_of

from .checks import Case, check_rule, check_strategy, collectives, one_node, randn, strategy_texts

NONE, MEAN, SUM = 0, 1, 2
IGNORED = -100


@pytest.mark.parametrize("op", ["softmax.int", "log_softmax.int"])
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_softmax(op: str, dim: int) -> None:
    case = one_node(f"aten.{op}", 30.0 * randn(4, 3, 6), dim)
    assert strategy_texts(case) == sorted(
        (f"S({d}) -> S({d})" for d in range(3)), key=lambda text: text[2] == str(dim % 3)
    )
    check_rule(case)


@pytest.mark.parametrize("op", ["_softmax.default", "_log_softmax.default"])
def test_softmax_as_decomposed(op: str) -> None:
    check_rule(one_node(f"aten.{op}", randn(4, 6), -1, False))


def test_softmax_with_masked_parts() -> None:
    x = randn(3, 4)
    x[0, :2] = float("-inf")  # all that one rank has of the row
    check_rule(one_node("aten.softmax.int", x, 1))


def test_softmax_in_half_precision_sums_in_single() -> None:
    x = randn(4, 4096).to(torch.bfloat16)
    case = one_node("aten.softmax.int", x, 1, constant=[x])
    (over_dim,) = [s for s in strategies_of(case.graph, case.node, 2) if str(s) == "S(1) -> S(1)"]
    check_strategy(case, (over_dim,), Mesh.parse("tensor=2"))


def test_other_reductions_of_exponentials_split_other_dims() -> None:
    assert strategy_texts(one_node("aten._safe_softmax.default", randn(4, 6), 1)) == [
        "S(0) -> S(0)"
    ]
    case = one_node("aten.logsumexp.default", randn(4, 6, 5), [1])
    assert strategy_texts(case) == ["S(0) -> S(0)", "S(2) -> S(1)"]
    check_rule(case)
    check_rule(one_node("aten.logsumexp.default", randn(4, 6, 5), [1], True))


# -- element by element ----------------------------------------------------------------------------

ELEMENT_LOSSES = [
    "mse_loss",
    "l1_loss",
    "smooth_l1_loss",
    "huber_loss",
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "kl_div",
]


@pytest.mark.parametrize("reduction", [NONE, MEAN, SUM])
@pytest.mark.parametrize("packet", ELEMENT_LOSSES)
def test_element_losses(packet: str, reduction: int) -> None:
    found, wanted = torch.sigmoid(randn(5, 4)), torch.sigmoid(randn(4, 5)).T.contiguous()
    case = one_node(f"aten.{packet}.default", found, wanted, reduction=reduction)
    result = {NONE: "S(0)", MEAN: "P(sum)", SUM: "P(sum)"}[reduction]
    assert f"S(0),S(0) -> {result}" in strategy_texts(case)
    check_rule(case)


def test_element_losses_with_broadcast_weights() -> None:
    x, wanted, weight, positive = randn(5, 4), torch.sigmoid(randn(5, 4)), randn(4), randn(5, 1)
    case = one_node(
        "aten.binary_cross_entropy_with_logits.default",
        x,
        wanted,
        weight,
        positive,
        MEAN,
        constant=[wanted, weight, positive],
    )
    assert strategy_texts(case) == ["S(0),S(0),R,S(0) -> P(sum)", "S(1),S(1),S(0),R -> P(sum)"]
    check_rule(case)


# -- classes ---------------------------------------------------------------------------------------


def targets(*shape: int, classes: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    found = torch.randint(0, classes, shape, generator=generator)
    found.flatten()[::3] = IGNORED
    return found


def class_loss(op: str, shape: tuple[int, ...], **kwargs: Any) -> Case:
    dim = 1 if len(shape) > 1 else 0
    rows = (*shape[:dim], *shape[dim + 1 :])
    logits, weight = 4.0 * randn(*shape), kwargs.get("weight")
    target = targets(*rows, classes=shape[dim]) if rows else torch.tensor(2)
    constant = [] if weight is None else [weight]
    if op.startswith("nll"):
        logits = torch.log_softmax(logits, dim)
    return one_node(f"aten.{op}.default", logits, target, constant=constant, **kwargs)


@pytest.mark.parametrize("reduction", [NONE, MEAN, SUM])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(7, 6), (4, 5, 3), (4, 5, 2, 3), (5,)])
@pytest.mark.parametrize("op", ["cross_entropy_loss", "nll_loss_nd"])
def test_class_losses(op: str, shape: tuple[int, ...], weighted: bool, reduction: int) -> None:
    classes = shape[min(1, len(shape) - 1)]
    weight = torch.rand(classes, dtype=torch.float64) if weighted else None
    case = class_loss(op, shape, weight=weight, reduction=reduction)
    extra = ",R" if weighted else ""
    texts = strategy_texts(case)
    assert f"S({min(1, len(shape) - 1)}),R{extra} -> R" in texts
    if len(shape) > 1:
        assert f"S(0),S(0){extra} -> {'S(0)' if reduction == NONE else 'P(sum)'}" in texts
    check_rule(case)


@pytest.mark.parametrize("reduction", [NONE, MEAN, SUM])
def test_label_smoothing(reduction: int) -> None:
    case = class_loss("cross_entropy_loss", (7, 6), reduction=reduction, label_smoothing=0.1)
    assert "S(1),R -> R" in strategy_texts(case)
    check_rule(case)
    weight = torch.rand(6, dtype=torch.float64)
    case = class_loss(
        "cross_entropy_loss", (7, 6), weight=weight, reduction=reduction, label_smoothing=0.1
    )
    assert "S(1),R,R -> R" not in strategy_texts(case)
    check_rule(case)


@pytest.mark.parametrize("reduction", [NONE, MEAN, SUM])
def test_probabilities_as_targets(reduction: int) -> None:
    wanted = torch.softmax(randn(7, 6), 1)
    case = one_node(
        "aten.cross_entropy_loss.default", randn(7, 6), wanted, None, reduction, constant=[wanted]
    )
    assert len(strategy_texts(case)) == 1
    check_rule(case)


def test_a_part_whose_rows_are_all_ignored() -> None:
    target = torch.tensor([IGNORED, IGNORED, 3, IGNORED])
    check_rule(one_node("aten.cross_entropy_loss.default", randn(4, 6), target), parts=(2, 4))


def test_a_batch_whose_rows_are_all_ignored_has_no_mean() -> None:
    target = torch.full((4,), IGNORED)
    check_rule(one_node("aten.cross_entropy_loss.default", randn(4, 6), target), parts=(2,))


def test_logits_far_from_zero_over_ranks() -> None:
    case = one_node("aten.cross_entropy_loss.default", 900.0 * randn(6, 8), torch.arange(6))
    check_rule(case)


def test_the_logits_of_a_split_vocabulary_are_not_gathered() -> None:
    case = class_loss("cross_entropy_loss", (64, 32))
    (split,) = [s for s in strategies_of(case.graph, case.node, 2) if str(s) == "S(1),R -> R"]
    found = collectives(case, (split,), Mesh.parse("tensor=2"))
    assert {name for name, _ in found} == {"cutset.all_reduce.default"}
    assert max(type.numel for _, type in found) == 64


def test_mean_of_half_precision_logits_counts_rows_exactly() -> None:
    logits = randn(600, 4).to(torch.bfloat16)
    target = torch.arange(600) % 4
    case = one_node("aten.cross_entropy_loss.default", logits, target, constant=[logits])
    for strategy in strategies_of(case.graph, case.node, 2):
        check_strategy(case, (strategy,), Mesh.parse("tensor=2"), relative_error=0.01)
