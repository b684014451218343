"""Prices corrected by measurement: what was measured counts, the rest by what is like it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cutset.compiler.ir.corrections import Correction, Corrections, Signature
from cutset.compiler.ir.graph import Graph, Mode
from cutset.cost_models.analysis import weight_like_values
from cutset.cost_models.collectives import Network
from cutset.cost_models.corrections import (
    FactorTable,
    Share,
    fit_corrections,
    least,
    signature_of,
)
from cutset.cost_models.ops import price
from tests.exactness.placed import cpu_type, cpu_workers
from tests.ir.builders import GraphBuilder, mlp

PLAIN = cpu_type("worker")


def signatures(graph: Graph, fraction: float = 1.0) -> list[Signature]:
    weights = weight_like_values(graph)
    batched = frozenset(value.id for value in graph.values if value.id not in weights)
    return [
        signature_of(graph, node, batch_fraction=fraction, batched=batched, weights=weights)
        for node in graph.nodes
    ]


def test_each_phase_has_its_factor_and_only_where_the_signature_is() -> None:
    graph = mlp(2, mode=Mode.TRAIN)
    own = signatures(graph)
    linear = next(i for i, node in enumerate(graph.nodes) if node.op.packet == "linear")
    entry = Correction(own[linear], 2.0, 3.0, 5.0)
    before = price(graph, PLAIN)
    after = price(graph, replace(PLAIN, corrections=Corrections((entry,))))
    assert after[linear].forward_seconds == 2.0 * before[linear].forward_seconds
    assert after[linear].backward_weight_seconds == 5.0 * before[linear].backward_weight_seconds
    for node, old, new in zip(graph.nodes, before, after, strict=True):
        if node.op.packet != "linear" and node.op.category.value != "matmul":
            assert new == old


def test_rows_of_a_microbatch_are_part_of_the_signature() -> None:
    half, whole = (mlp(1, batch=batch, mode=Mode.TRAIN) for batch in (4, 8))
    assert signatures(whole, 0.5)[0] == signatures(half)[0] != signatures(whole)[0]


def linear(rows: int, *, wide: int = 64, grad: str = "^") -> Signature:
    return Signature(
        "aten.linear.default",
        "(%0, %1)",
        (f"f32[{rows},64]{grad}", f"f32[{wide},64]^w"),
        (f"f32[{rows},{wide}]",),
    )


def test_the_nearest_shapes_of_the_same_operator_count() -> None:
    table = FactorTable.of(
        [Correction(linear(8), 2.0, 1.0, 1.0), Correction(linear(512), 4.0, None, 1.0)]
    )
    assert table.factors(linear(16))[0] == 2.0
    assert table.factors(linear(300))[0] == 4.0
    assert table.factors(linear(300))[1] == 1.0  # of the other, as this one has none
    assert table.factors(linear(8, wide=128))[0] == 2.0


def test_then_the_category_counts_and_then_nothing() -> None:
    table = FactorTable.of(
        [Correction(linear(8), 2.0, 1.0, 1.0), Correction(linear(512), 8.0, 1.0, 1.0)]
    )
    product = Signature("aten.bmm.default", "", ("f32[2,4,4]", "f32[2,4,4]"), ("f32[2,4,4]",))
    assert table.factors(product)[0] == pytest.approx(4.0)
    other = Signature("aten.gelu.default", "", ("f32[2]",), ("f32[2]",))
    assert table.factors(other) == (1.0, 1.0, 1.0)


def test_no_price_is_below_the_least_one() -> None:
    known = Corrections(
        (Correction(linear(8), 2.0, 0.5, 1.0), Correction(linear(512), 4.0, 0.25, None))
    )
    bound, table = (FactorTable.of(item.entries) for item in (least(known), known))
    for signature in (linear(8), linear(16), linear(512), linear(4096)):
        pairs = zip(bound.factors(signature), table.factors(signature), strict=True)
        assert all(low <= factor for low, factor in pairs)
    assert bound.factors(linear(512)) == (2.0, 0.25, 1.0)


def test_an_operator_in_several_parts_has_their_mean_by_time() -> None:
    shares = [
        Share(linear(8), (1.0, 0.0, 2.0), (2.0, 1.0, None), weight=3.0),
        Share(linear(8), (3.0, 0.0, 2.0), (4.0, 1.0, 7.0)),
    ]
    corrections = fit_corrections(shares)
    assert corrections is not None
    assert corrections.entries == (Correction(linear(8), 3.0, None, 7.0),)
    assert fit_corrections([]) is None


def test_the_parts_of_a_whole_sum_to_what_was_measured() -> None:
    graph = mlp(3, mode=Mode.TRAIN)
    weights = weight_like_values(graph)
    costs = price(graph, PLAIN)
    forward = sum(cost.forward_seconds for cost in costs)
    measured = 1.75 * forward
    shares = [
        Share(
            signature_of(graph, node, weights=weights),
            (cost.forward_seconds, 0.0, 0.0),
            (measured / forward, None, None),
        )
        for node, cost in zip(graph.nodes, costs, strict=True)
    ]
    after = price(graph, replace(PLAIN, corrections=fit_corrections(shares)))
    assert sum(cost.forward_seconds for cost in after) == pytest.approx(measured, rel=1e-3)


def test_collectives_keep_the_price_of_their_links() -> None:
    build = GraphBuilder("shared", Mode.INFER)
    h = build.op("aten.gelu.default", build.input("x", (8, 8)))
    build.output(build.op("cutset.all_reduce.default", h, "tensor", "sum"))
    graph = build.build()
    sum_of_two = signatures(graph)[1]
    kind = replace(PLAIN, corrections=Corrections((Correction(sum_of_two, 9.0, 9.0, 9.0),)))
    network = Network(cpu_workers(PLAIN, PLAIN), (("tensor", (0, 1)),))
    before, after = (price(graph, item, network=network) for item in (PLAIN, kind))
    assert after == before
    assert before[1].forward_seconds > 0.0
