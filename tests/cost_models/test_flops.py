"""Each figure is derived by hand from the definition of the op; one multiply-add counts two."""

from __future__ import annotations

import pytest

from cutset.compiler.ir.graph import Graph
from cutset.cost_models.flops import forward_flops
from tests.ir.builders import GraphBuilder


def last_flops(build: GraphBuilder) -> float:
    graph: Graph = build.build()
    return forward_flops(graph, graph.nodes[-1])


def test_linear() -> None:
    """[6, 5, 4] x [3, 4]^T: 6*5*3 results, each a sum of 4 products."""
    build = GraphBuilder()
    x, w, b = build.input("x", (6, 5, 4)), build.parameter("w", (3, 4)), build.parameter("b", (3,))
    build.op("aten.linear.default", x, w, b)
    assert last_flops(build) == 2 * 6 * 5 * 3 * 4


@pytest.mark.parametrize(
    ("op", "left", "right", "flops"),
    [
        ("aten.mm.default", (5, 4), (4, 3), 2 * 5 * 3 * 4),
        ("aten.bmm.default", (7, 5, 4), (7, 4, 3), 7 * 2 * 5 * 3 * 4),
        ("aten.matmul.default", (2, 7, 5, 4), (4, 3), 2 * 7 * 2 * 5 * 3 * 4),
        ("aten.mv.default", (5, 4), (4,), 2 * 5 * 4),
        ("aten.dot.default", (4,), (4,), 2 * 4),
        ("aten.outer.default", (5,), (4,), 5 * 4),
    ],
)
def test_products(op: str, left: tuple[int, ...], right: tuple[int, ...], flops: int) -> None:
    build = GraphBuilder()
    build.op(op, build.input("x", left), build.input("y", right))
    assert last_flops(build) == flops


def test_addmm_and_baddbmm() -> None:
    build = GraphBuilder()
    x, w, b = build.input("x", (5, 4)), build.parameter("w", (4, 3)), build.parameter("b", (3,))
    build.op("aten.addmm.default", b, x, w)
    assert last_flops(build) == 2 * 5 * 3 * 4
    build = GraphBuilder()
    x, y, z = build.input("x", (2, 5, 4)), build.input("y", (2, 4, 3)), build.input("z", (2, 5, 3))
    build.op("aten.baddbmm.default", z, x, y)
    assert last_flops(build) == 2 * 2 * 5 * 3 * 4


def test_einsum_goes_pair_by_pair() -> None:
    """bij,bjk->bik is a batched product: b*i*j*k multiply-adds. With a third operand the first
    pair leaves b,i,k, and the second pair joins over k,l."""
    build = GraphBuilder()
    x, y = build.input("x", (2, 5, 4)), build.input("y", (2, 4, 3))
    build.op("aten.einsum.default", "bij,bjk->bik", [x, y])
    assert last_flops(build) == 2 * (2 * 5 * 4 * 3)
    build = GraphBuilder()
    x, y, z = build.input("x", (2, 5, 4)), build.input("y", (2, 4, 3)), build.input("z", (3, 6))
    build.op("aten.einsum.default", "bij,bjk,kl->bil", [x, y, z])
    assert last_flops(build) == 2 * (2 * 5 * 4 * 3) + 2 * (2 * 5 * 3 * 6)


def attention(causal: bool, kv_heads: int = 8, rows: int = 16, columns: int = 16) -> float:
    build = GraphBuilder()
    query = build.input("q", (2, 8, rows, 32))
    key = build.input("k", (2, kv_heads, columns, 32))
    value = build.input("v", (2, kv_heads, columns, 32))
    build.op(
        "aten.scaled_dot_product_attention.default",
        query, key, value, None, 0.0, causal,
        enable_gqa=kv_heads != 8,
    )  # fmt: skip
    return last_flops(build)


def test_attention_is_two_products() -> None:
    """Scores: 2*8 heads, 16x16 sums of 32; result: 16x32 sums of 16."""
    assert attention(causal=False) == 2 * 8 * (2 * 16 * 16 * 32 + 2 * 16 * 32 * 16)


def test_causal_attention_computes_the_lower_triangle() -> None:
    """16 * 17 / 2 of the 16 * 16 scores remain; 4 rows of 16 columns keep 1 + 2 + 3 + 4."""
    assert attention(causal=True) == attention(causal=False) * (16 * 17 / 2) / (16 * 16)
    assert attention(causal=True, rows=4) == 2 * 8 * (1 + 2 + 3 + 4) * 2 * (32 + 32)


def test_grouped_heads_share_keys_but_not_products() -> None:
    assert attention(causal=False, kv_heads=2) == attention(causal=False)


def convolution(channels: int, filters: int, groups: int, transposed: bool) -> float:
    build = GraphBuilder()
    shape = (channels, filters // groups) if transposed else (filters, channels // groups)
    image, weight = build.input("x", (2, channels, 8, 8)), build.parameter("w", (*shape, 3, 3))
    build.op(
        "aten.convolution.default",
        image, weight, None, [1, 1], [1, 1], [1, 1], transposed, [0, 0], groups,
    )  # fmt: skip
    return last_flops(build)


def test_convolution() -> None:
    """2*8*8 places, 6 filters, each a sum over 4 channels (2 in a group) and 3x3 taps."""
    assert convolution(4, 6, 1, transposed=False) == 2 * (2 * 8 * 8 * 6) * 4 * 9
    assert convolution(4, 6, 2, transposed=False) == 2 * (2 * 8 * 8 * 6) * 2 * 9


def test_transposed_convolution_counts_inputs() -> None:
    """Each of 2*4*8*8 inputs meets 6 filters (3 in a group) of 3x3 taps."""
    assert convolution(4, 6, 1, transposed=True) == 2 * (2 * 4 * 8 * 8) * 6 * 9
    assert convolution(4, 6, 2, transposed=True) == 2 * (2 * 4 * 8 * 8) * 3 * 9


def test_recurrent() -> None:
    """LSTM, 7 steps of 2 rows: input 3 -> 4 gates of 5, hidden 5 -> 4 gates of 5."""
    build = GraphBuilder()
    x = build.input("x", (2, 7, 3))
    state = [build.input("h", (1, 2, 5), batch_dim=None), build.input("c", (1, 2, 5))]
    weights = [build.parameter("wi", (20, 3)), build.parameter("wh", (20, 5))]
    build.ops("aten.lstm.input", x, state, weights, False, 1, 0.0, False, False, True)
    assert last_flops(build) == 2 * (7 * 2) * (20 * 3 + 20 * 5)


def test_elementwise_work_is_per_element_and_views_are_free() -> None:
    build = GraphBuilder()
    x = build.input("x", (6, 4))
    build.op("aten.gelu.default", x)
    assert last_flops(build) == 2 * 24
    build.op("aten.view.default", x, (24,))
    assert last_flops(build) == 0
