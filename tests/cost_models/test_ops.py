from __future__ import annotations

import math

import pytest
import torch

from cutset.compiler.ir.cluster import DeviceType
from cutset.compiler.ir.graph import Graph, Mode
from cutset.cost_models.analysis import batch_rows, batch_values, weight_like_values
from cutset.cost_models.ops import price
from tests.ir.builders import GraphBuilder, mlp, residual, tied_embedding

# 1 GFLOP/s and 1 GB/s: one operation or byte takes a nanosecond.
SLOW = DeviceType("slow", "cpu", 1 << 30, 1e9, (("f32", 1e9),), overhead_seconds=1e-6)
NANO, CALL = 1e-9, 1e-6


def linear_graph(rows: int = 16, wide: int = 64) -> Graph:
    build = GraphBuilder("linear", Mode.TRAIN)
    x = build.boundary("x", (rows, wide))
    weight, bias = build.parameter("w", (32, wide)), build.parameter("b", (32,))
    build.output(build.op("aten.linear.default", x, weight, bias))
    return build.build()


def test_a_product_is_bound_by_flops_and_its_adjoint_is_one_product_per_operand() -> None:
    """Forward, dI and dW are 2*16*64*32 = 65536 operations; moving bytes takes less. The bias's
    gradient moves 16*32 + 32 elements."""
    (cost,) = price(linear_graph(), SLOW)
    product = 2 * 16 * 64 * 32 * NANO + CALL
    assert cost.forward_seconds == pytest.approx(product)
    assert cost.backward_input_seconds == pytest.approx(product)
    bias = (16 * 32 + 32) * 4 * NANO + CALL
    assert cost.backward_weight_seconds == pytest.approx(product + bias)


def test_a_thin_product_is_bound_by_bytes() -> None:
    """One row: 2*64*32 operations but 4*(64 + 32*64 + 32 + 32) bytes."""
    (cost,) = price(linear_graph(rows=1), SLOW)
    assert cost.forward_seconds == pytest.approx(4 * (64 + 32 * 64 + 32 + 32) * NANO + CALL)


def test_what_requires_no_gradient_has_no_backward() -> None:
    build = GraphBuilder("frozen", Mode.TRAIN)
    x = build.input("x", (8, 4))
    frozen = build.parameter("f", (4, 4), requires_grad=False)
    weight = build.parameter("w", (4, 4))
    hidden = build.op("aten.linear.default", x, frozen)
    build.loss(build.op("aten.sum.default", build.op("aten.linear.default", hidden, weight)))
    first, second, _ = price(build.build(), SLOW)
    assert first.backward_seconds == 0.0
    assert second.backward_input_seconds == 0.0 and second.backward_weight_seconds > 0.0


def test_views_are_free() -> None:
    build = GraphBuilder("views", Mode.TRAIN)
    x = build.boundary("x", (8, 4))
    build.output(build.op("aten.transpose.int", build.op("aten.view.default", x, (4, 8)), 0, 1))
    assert sum(cost.total_seconds for cost in price(build.build(), SLOW)) == 0.0


def test_a_transposed_weight_is_still_a_weight() -> None:
    build = GraphBuilder("transposed", Mode.TRAIN)
    x, weight = build.boundary("x", (8, 4)), build.parameter("w", (4, 4))
    turned = build.op("aten.t.default", weight)
    build.output(build.op("aten.mm.default", x, turned))
    graph = build.build()
    assert weight_like_values(graph) == {weight.id, turned.id}
    cost = price(graph, SLOW)[1]
    assert cost.backward_input_seconds == cost.backward_weight_seconds > 0.0


def test_a_lookup_reads_the_rows_it_looks_up() -> None:
    """32 of 100000 rows of 8: read and written once each, beside 32 indices."""
    build = GraphBuilder("lookup", Mode.INFER)
    table, ids = build.parameter("t", (100_000, 8)), build.input("ids", (32,), torch.int64)
    build.op("aten.embedding.default", table, ids)
    (cost,) = price(build.build(), SLOW)
    assert cost.forward_seconds == pytest.approx((2 * 32 * 8 * 4 + 32 * 8) * NANO + CALL)


def test_attention_backward_is_two_and_a_half_forwards() -> None:
    build = GraphBuilder("attention", Mode.TRAIN)
    query, key, value = (build.boundary(name, (1, 2, 64, 64)) for name in "qkv")
    build.output(build.op("aten.scaled_dot_product_attention.default", query, key, value))
    (cost,) = price(build.build(), SLOW)
    forward = cost.forward_seconds - CALL
    assert cost.backward_input_seconds - CALL == pytest.approx(2.5 * forward)


def test_rates_depend_on_dtype() -> None:
    build = GraphBuilder("half", Mode.INFER)
    x = build.input("x", (64, 64), torch.bfloat16)
    build.op("aten.mm.default", x, build.parameter("w", (64, 64), torch.bfloat16))
    fast = DeviceType("f", "cuda", 1, 1e12, (("f32", 1e9), ("bf16", 4e9)))
    (cost,) = price(build.build(), fast)
    assert cost.forward_seconds == pytest.approx(2 * 64**3 / 4e9)


@pytest.mark.parametrize("graph", [mlp(), residual(), tied_embedding(batch=4)])
def test_costs_are_finite_and_not_negative(graph: Graph) -> None:
    for cost in price(graph, SLOW, batch_fraction=0.5):
        for seconds in (
            cost.forward_seconds, cost.backward_input_seconds, cost.backward_weight_seconds
        ):  # fmt: skip
            assert math.isfinite(seconds) and seconds >= 0.0


def test_half_a_batch_costs_half_the_work() -> None:
    """Without overhead, all that the batch pays for halves; weights are read as before."""
    free = DeviceType("free", "cpu", 1, 1e30, (("f32", 1e9),))
    for whole, half in zip(price(mlp(), free), price(mlp(), free, batch_fraction=0.5), strict=True):
        assert half.forward_seconds == pytest.approx(whole.forward_seconds / 2)
        assert half.backward_seconds == pytest.approx(whole.backward_seconds / 2)


def test_batch_dependence() -> None:
    """Values fed by batched inputs grow, and factories whose first dim is the rows; masks and
    weights do not."""
    graph = tied_embedding(batch=4, length=5)
    grown = {graph.values[index].name for index in batch_values(graph)}
    assert batch_rows(graph) == 4
    assert {"ids", "embedding", "linear", "scaled_dot_product_attention", "view"} <= grown
    assert grown.isdisjoint({"wte_weight", "mix_weight", "mask", "tril", "cross_entropy_loss"})


def test_a_factory_of_the_batch_size_grows() -> None:
    build = GraphBuilder()
    build.input("x", (6, 4))
    zeros = build.op("aten.zeros.default", (6, 2))
    table = build.op("aten.zeros.default", (5, 2))
    grown = batch_values(build.build())
    assert zeros.id in grown and table.id not in grown
