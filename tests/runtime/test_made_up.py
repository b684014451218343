"""Made-up values are legal, and indices are spread over what they may point at."""

from __future__ import annotations

import torch

from cutset.compiler.codegen.cut import cut_stages
from cutset.compiler.ir.graph import Graph, Mode
from cutset.compiler.ir.plan import Stage
from cutset.runtime.made_up import index_limits, made_up
from tests.ir.builders import GraphBuilder


def language_model() -> Graph:
    """Rows of a table of 50, predicted among 20 classes; what else reads the integers compares."""
    build = GraphBuilder("lm", Mode.INFER)
    ids = build.input("ids", (4, 8), torch.int64)
    labels = build.input("labels", (4, 8), torch.int64)
    table = build.parameter("table", (50, 20))
    rows = build.op("aten.embedding.default", table, build.op("aten.contiguous.default", ids))
    build.op("aten.ne.Scalar", ids, 0)
    flat = build.op("aten.reshape.default", labels, (32,))
    scores = build.op("aten.reshape.default", rows, (32, 20))
    build.output(build.op("aten.cross_entropy_loss.default", scores, flat))
    return build.build()


def made(graph: Graph, name: str) -> torch.Tensor:
    value = next(value for value in graph.values if value.name == name)
    return made_up(value, torch.Generator().manual_seed(0), index_limits([graph]))


def test_indices_are_spread_over_what_they_point_at() -> None:
    graph = language_model()
    ids, labels = made(graph, "ids"), made(graph, "labels")
    assert ids.dtype is torch.int64 and ids.shape == (4, 8)
    assert ids.min() >= 0 and ids.max() < 50 and len(ids.unique()) > 15
    assert labels.min() >= 0 and labels.max() < 20 and len(labels.unique()) > 8


def test_stages_of_single_nodes_say_the_same() -> None:
    graph = language_model()
    stages = cut_stages(graph, tuple(Stage(node.id, (0,), (node.id,)) for node in graph.nodes))
    whole = index_limits([graph])
    cut = index_limits([stage.graph for stage in stages])
    assert cut == whole and (cut["ids"], cut["labels"]) == (50, 20)


def test_the_narrowest_use_counts() -> None:
    build = GraphBuilder("two", Mode.INFER)
    ids = build.input("ids", (6,), torch.int64)
    for size in (50, 7, 20):
        build.output(
            build.op("aten.embedding.default", build.parameter(f"t{size}", (size, 3)), ids)
        )
    assert index_limits([build.build()]) == {"ids": 7}


def test_places_along_a_dim() -> None:
    build = GraphBuilder("along", Mode.INFER)
    table = build.input("table", (5, 6, 7))
    first, last, dim = (build.input(name, (3,), torch.int64) for name in ("first", "last", "dim"))
    build.output(build.op("aten.index.Tensor", table, (first, None, last)))
    build.output(build.op("aten.index_select.default", table, -2, dim))
    assert index_limits([build.build()]) == {"first": 5, "last": 7, "dim": 6}


def test_integers_that_are_reckoned_with_are_zeros() -> None:
    build = GraphBuilder("shifted", Mode.INFER)
    ids = build.input("ids", (6,), torch.int64)
    shifted = build.op("aten.add.Tensor", ids, 1)
    build.output(build.op("aten.embedding.default", build.parameter("table", (50, 3)), shifted))
    assert not made(build.build(), "ids").any()


def test_small_integers_hold_what_they_can() -> None:
    build = GraphBuilder("bytes", Mode.INFER)
    ids = build.input("ids", (64,), torch.int8)
    table = build.parameter("table", (5000, 3))
    build.output(
        build.op("aten.embedding.default", table, build.op("aten.to.dtype", ids, torch.int64))
    )
    assert made(build.build(), "ids").min() >= 0
