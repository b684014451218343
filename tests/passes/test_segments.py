from __future__ import annotations

import itertools

import pytest

from cutset.compiler.ir.errors import UsageError
from cutset.compiler.ir.graph import Graph, Mode
from cutset.cost_models.action_memory import action_memory
from cutset.cost_models.memory_tables import memory_model
from cutset.cost_models.presets import local_cpu_cluster
from cutset.passes.context import PlanOptions
from cutset.passes.pipeline import plan_graph
from cutset.passes.recompute import choose_recompute
from cutset.passes.segments import find_segments, full_recompute, selective_recompute
from tests.ir.builders import GraphBuilder, mlp


def blocks(num_blocks: int = 3, *, viewed: bool = False) -> Graph:
    """linear 8 -> 16, gelu, linear 16 -> 8, sum (viewed or not), in each block; then a mean."""
    build = GraphBuilder("blocks", Mode.TRAIN)
    hidden = build.input("x", (4, 8))
    for block in range(num_blocks):
        path = f"layers.{block}"
        first = build.parameter(f"{path}.first", (16, 8))
        second = build.parameter(f"{path}.second", (8, 16))
        wide = build.op("aten.linear.default", hidden, first, module=path)
        wide = build.op("aten.gelu.default", wide, module=path)
        narrow = build.op("aten.linear.default", wide, second, module=path)
        hidden = build.op("aten.add.Tensor", hidden, narrow, module=path)
        if viewed:
            hidden = build.op("aten.view.default", hidden, (4, 8), module=path)
    build.loss(build.op("aten.mean.default", hidden))
    return build.build()


def saved(graph: Graph, nodes: tuple[int, ...]) -> float:
    return action_memory(memory_model(graph), None, nodes).saved_bytes


def test_a_block_runs_again_but_for_what_leaves_it() -> None:
    assert full_recompute(blocks()) == ((0, 1, 2), (4, 5, 6), (8, 9, 10))


def test_what_leaves_a_block_as_a_view_is_kept_with_its_storage() -> None:
    assert full_recompute(blocks(2, viewed=True)) == ((0, 1, 2), (5, 6, 7))


def test_saved_bytes_by_hand() -> None:
    """Per block linear's and gelu's results, 256 bytes each; a sum of 128 between blocks."""
    graph = blocks()
    assert saved(graph, ()) == 3 * 2 * 256 + 2 * 128
    assert saved(graph, choose_recompute(graph, "full")) == 2 * 128
    assert saved(graph, choose_recompute(graph, "selective")) == 3 * 256 + 2 * 128


def test_selective_runs_no_product_again() -> None:
    assert selective_recompute(blocks()) == ((1,), (5,), (9,))


def cheap_block() -> Graph:
    """Two linears and elementwise work of several widths in two equal blocks."""
    build = GraphBuilder("cheap", Mode.TRAIN)
    hidden = build.input("x", (4, 8))
    for block in range(2):
        path = f"layers.{block}"
        weight = build.parameter(f"{path}.weight", (8, 8))
        a = build.op("aten.linear.default", hidden, weight, module=path)
        b = build.op("aten.tanh.default", a, module=path)
        c = build.op("aten.mean.dim", b, (1,), True, module=path)
        d = build.op("aten.exp.default", c, module=path)
        e = build.op("aten.mul.Tensor", b, d, module=path)
        f = build.op("aten.sigmoid.default", e, module=path)
        hidden = build.op("aten.add.Tensor", hidden, f, module=path)
    build.loss(build.op("aten.mean.default", hidden))
    return build.build()


def test_no_choice_of_cheap_nodes_keeps_less() -> None:
    graph = cheap_block()
    chosen = choose_recompute(graph, "selective")
    first, second = (segment.nodes for segment in find_segments(graph))
    assert tuple(node - first[0] for node in chosen if node in first) == tuple(
        node - second[0] for node in chosen if node in second
    )
    inner = [1, 2, 3, 4, 5]  # neither the linear nor the sum
    least = min(
        saved(graph, tuple(sorted(start + i for start in (first[0], second[0]) for i in nodes)))
        for count in range(len(inner) + 1)
        for nodes in itertools.combinations(inner, count)
    )
    assert saved(graph, chosen) == least < saved(graph, ())


def test_a_graph_without_blocks_is_cut_into_even_segments() -> None:
    build = GraphBuilder("plain", Mode.TRAIN)
    hidden = build.input("x", (4, 8))
    for layer in range(9):
        weight = build.parameter(f"w{layer}", (8, 8))
        hidden = build.op("aten.linear.default", hidden, weight, module=f"m{layer}")
        hidden = build.op("aten.relu.default", hidden, module=f"m{layer}")
    build.loss(build.op("aten.mean.default", hidden))
    graph = build.build()
    segments = find_segments(graph)
    assert len(segments) == 3, "relu's results are kept, of nine nodes"
    assert [node for segment in segments for node in segment.nodes] == list(range(19))
    assert saved(graph, choose_recompute(graph, "full")) == pytest.approx(2 * 128, abs=128)


def test_inference_recomputes_nothing() -> None:
    assert choose_recompute(mlp(mode=Mode.INFER), "full") == ()


def test_an_unknown_way_is_refused() -> None:
    with pytest.raises(UsageError, match="'some'"):
        choose_recompute(mlp(), "some")


def test_the_plan_and_its_prediction_follow() -> None:
    graph, cluster = blocks(6), local_cpu_cluster(1)
    plans = [
        plan_graph(
            graph,
            cluster,
            batch_size=8,
            options=PlanOptions(num_stages=1, num_microbatches=2, recompute=how),
        )
        for how in ("none", "selective", "full")
    ]
    assert [len(plan.recomputed) for plan in plans] == [0, 6, 18]
    predictions = [plan.prediction for plan in plans]
    kept = [entry.memory[0].activations_bytes for entry in predictions if entry]
    backward = [entry.stage_backward_seconds[0] for entry in predictions if entry]
    assert kept[0] > kept[1] > kept[2]
    assert backward[0] < backward[1] < backward[2]
