"""Rules of convolution, pooling, resampling and padding."""

from __future__ import annotations

from typing import Any

import pytest

from .checks import Case, check_rule, one_node, randn, strategy_texts


def conv(op: str, x: tuple[int, ...], weight: tuple[int, ...], *rest: Any) -> Case:
    bias = randn(weight[0])
    return one_node(f"aten.{op}", randn(*x), randn(*weight), bias, *rest)


def test_convolution() -> None:
    case = conv("conv2d.default", (3, 4, 5, 5), (6, 4, 3, 3), [2, 2], [1, 1])
    assert strategy_texts(case) == [
        "S(0),R,R -> S(0)",
        "R,S(0),S(0) -> S(1)",
        "S(1),S(1),R! -> P(sum)",
        "P(sum),R,R! -> P(sum)",
    ]
    check_rule(case)


CASES = {
    "conv1d.default": ((3, 4, 8), (6, 4, 3)),
    "conv1d.padding": ((3, 4, 8), (6, 4, 3), [1], "same"),
    "conv2d.padding": ((3, 4, 6, 6), (6, 4, 3, 3), [1, 1], "same"),
    "conv3d.default": ((3, 4, 3, 3, 3), (6, 4, 2, 2, 2)),
    "convolution.default": ((3, 4, 8), (6, 4, 3), [1], [0], [1], False, [0], 1),
}


@pytest.mark.parametrize("op", CASES)
def test_convolutions(op: str) -> None:
    case = conv(op, *CASES[op])
    assert len(strategy_texts(case)) == 4
    check_rule(case)


def test_convolution_of_one_image() -> None:
    case = conv("conv2d.default", (4, 5, 5), (6, 4, 3, 3))
    assert strategy_texts(case) == [
        "R,S(0),S(0) -> S(0)",
        "S(0),S(1),R! -> P(sum)",
        "P(sum),R,R! -> P(sum)",
    ]
    check_rule(case)


def test_convolution_without_bias() -> None:
    check_rule(one_node("aten.conv2d.default", randn(3, 4, 5, 5), randn(6, 4, 3, 3)))


@pytest.mark.parametrize("op", ["conv_transpose1d.default", "convolution.default"])
def test_transposed_convolution(op: str) -> None:
    rest: tuple[Any, ...] = ([2],) if "transpose" in op else ([2], [0], [1], True, [0], 1)
    case = one_node(f"aten.{op}", randn(3, 4, 5), randn(4, 6, 2), randn(6), *rest)
    assert strategy_texts(case) == [
        "S(0),R,R -> S(0)",
        "R,S(1),S(0) -> S(1)",
        "S(1),S(0),R! -> P(sum)",
        "P(sum),R,R! -> P(sum)",
    ]
    check_rule(case)


@pytest.mark.parametrize("space", [(2, 3), (2, 3, 2)])
def test_transposed_convolution_of_other_ranks(space: tuple[int, ...]) -> None:
    x, weight = randn(3, 4, *space), randn(4, 6, *([2] * len(space)))
    case = one_node(f"aten.conv_transpose{len(space)}d.input", x, weight, randn(6))
    assert len(strategy_texts(case)) == 4
    check_rule(case, pairs=False)


def test_depthwise_convolution_splits_channels_unevenly() -> None:
    case = conv("conv2d.default", (3, 5, 4, 4), (5, 1, 3, 3), [1, 1], [1, 1], [1, 1], 5)
    assert "S(1),S(0),S(0) -> S(1)" in strategy_texts(case, 2)
    check_rule(case)


def test_grouped_convolution_splits_whole_groups() -> None:
    case = conv("conv2d.default", (3, 8, 4, 4), (12, 2, 3, 3), [1, 1], [0, 0], [1, 1], 4)
    assert "S(1),S(0),S(0) -> S(1)" in strategy_texts(case, 2)
    assert not any("S(1)" in text for text in strategy_texts(case, 3))
    check_rule(case, parts=(2, 3, 4))
    turned = one_node(
        "aten.conv_transpose1d.default",
        randn(3, 4, 5),
        randn(4, 3, 2),
        randn(6),
        [2],
        [0],
        [0],
        2,
    )
    assert "S(1),S(0),S(0) -> S(1)" in strategy_texts(turned, 2)
    check_rule(turned)


POOLS: dict[str, tuple[Any, ...]] = {
    "max_pool2d.default": ([2, 2],),
    "max_pool2d_with_indices.default": ([2, 2],),
    "adaptive_max_pool2d.default": ([2, 2],),
    "avg_pool2d.default": ([3, 3], [1, 1], [1, 1], False, False),
    "adaptive_avg_pool2d.default": ([1, 1],),
    "upsample_nearest2d.vec": (None, [2.0, 2.0]),
    "upsample_bilinear2d.vec": ([5, 5], False, None),
    "upsample_bicubic2d.vec": ([5, 5], True, None),
    "im2col.default": ([2, 2], [1, 1], [0, 0], [1, 1]),
}


@pytest.mark.parametrize("op", POOLS)
def test_pooling_and_resampling(op: str) -> None:
    case = one_node(f"aten.{op}", randn(3, 4, 4, 6), *POOLS[op])
    texts = strategy_texts(case)
    assert texts[0].startswith("S(0) -> S(0)") and texts[1].startswith("S(1) -> S(1)")
    linear = "max" not in op
    assert ("P(sum) -> P(sum)" in texts) is linear and len(texts) == 2 + linear
    check_rule(case)


OTHER_RANKS: dict[str, tuple[Any, ...]] = {
    "max_pool1d.default": ((3, 4, 6), [2]),
    "avg_pool1d.default": ((3, 4, 6), [2]),
    "adaptive_avg_pool1d.default": ((3, 4, 6), [2]),
    "upsample_nearest1d.vec": ((3, 4, 6), None, [2.0]),
    "upsample_linear1d.vec": ((3, 4, 6), [4], False, None),
    "max_pool3d.default": ((3, 4, 2, 4, 2), [2, 2, 2]),
    "avg_pool3d.default": ((3, 4, 2, 4, 2), [2, 2, 2]),
}


@pytest.mark.parametrize("op", OTHER_RANKS)
def test_pooling_and_resampling_of_other_ranks(op: str) -> None:
    shape, *rest = OTHER_RANKS[op]
    case = one_node(f"aten.{op}", randn(*shape), *rest)
    assert strategy_texts(case)[:2] == ["S(0) -> S(0)", "S(1) -> S(1)"]
    check_rule(case)


def test_pooling_of_one_image() -> None:
    check_rule(one_node("aten.max_pool2d.default", randn(4, 6, 6), [2, 2]))


def test_pixel_shuffle() -> None:
    case = one_node("aten.pixel_shuffle.default", randn(3, 8, 2, 2), 2)
    assert strategy_texts(case) == ["S(0) -> S(0)"]
    check_rule(case)
    check_rule(one_node("aten.pixel_unshuffle.default", randn(3, 2, 4, 4), 2))


def test_grid_sampler() -> None:
    case = one_node("aten.grid_sampler.default", randn(3, 4, 5, 5), randn(3, 2, 6, 2), 0, 0, False)
    assert strategy_texts(case) == ["S(0),S(0) -> S(0)", "S(1),R -> S(1)"]
    check_rule(case)


def test_pad() -> None:
    case = one_node("aten.pad.default", randn(3, 4, 6), [0, 0, 1, 2])
    assert strategy_texts(case) == ["S(0) -> S(0)", "S(2) -> S(2)", "P(sum) -> P(sum)"]
    check_rule(case)
    filled = one_node("aten.constant_pad_nd.default", randn(3, 4, 6), [1, 0], 2.0)
    assert strategy_texts(filled) == ["S(0) -> S(0)", "S(1) -> S(1)"]
    check_rule(filled)
    check_rule(one_node("aten.pad.default", randn(3, 4, 6), [1, 1], "reflect"))


def test_weight_norm() -> None:
    case = one_node("aten._weight_norm.default", randn(4, 3, 5), randn(1, 1, 5), 2)
    assert strategy_texts(case) == ["S(2),S(2) -> S(2)"]
    check_rule(case)
