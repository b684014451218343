"""Constant attention masks become what they mean; others stay; equal inputs stay apart."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cutset.compiler.capture import capture
from cutset.compiler.capture.interpret import run_graph
from cutset.compiler.capture.masks import simplify_masks
from cutset.compiler.ir.graph import Graph, Mode
from cutset.compiler.ir.verify import verify_graph
from tests.ir.builders import GraphBuilder


def attention_graph(kind: str) -> Graph:
    build = GraphBuilder("attention", Mode.INFER)
    q = build.input("q", (2, 3, 5, 4))
    mask = build.op("aten.ones.default", [5, 5], dtype=torch.bool)
    if kind == "causal":
        mask = build.op("aten.tril.default", mask)
    elif kind == "banded":
        mask = build.op("aten.tril.default", mask, 1)
    elif kind == "given":
        mask = build.input("mask", (5, 5), torch.bool, batch_dim=None)
    elif kind == "additive":
        hidden = build.op("aten.full.default", [5, 5], float("-inf"))
        mask = build.op("aten.triu.default", hidden, 1)
    out = build.op("aten.scaled_dot_product_attention.default", q, q, q, mask)
    build.output(out)
    return build.build()


def attention_call(graph: Graph) -> tuple[object, ...]:
    (node,) = [node for node in graph.nodes if "attention" in node.op.name]
    return node.args[3:], node.kwargs


def test_causal_masks_are_recognised_and_not_computed() -> None:
    for kind in ("causal", "additive"):
        before = attention_graph(kind)
        after = simplify_masks(before)
        verify_graph(after)
        assert attention_call(after) == ((None,), (("is_causal", True),))
        assert len(after.nodes) == 1
        q = torch.randn(2, 3, 5, 4)
        torch.testing.assert_close(run_graph(after, {"q": q})[0], run_graph(before, {"q": q})[0])


def test_masks_that_hide_nothing_are_dropped() -> None:
    assert attention_call(simplify_masks(attention_graph("full"))) == ((None,), ())


def test_other_masks_stay() -> None:
    for kind in ("banded", "given"):
        graph = attention_graph(kind)
        assert attention_call(simplify_masks(graph)) == attention_call(graph)


def test_rows_that_are_alike_are_computed_once() -> None:
    """The mask would have four times the elements that are ever computed."""
    build = GraphBuilder("rows", Mode.INFER)
    rows, tokens = 1 << 10, 1 << 10
    q = build.input("q", (rows, 1, tokens, 4))
    place = build.op("aten.arange.default", tokens)
    row = build.op("aten.reshape.default", build.op("aten.arange.default", rows), [rows, 1, 1, 1])
    keys = build.op("aten.add.Tensor", build.op("aten.mul.Tensor", row, 0), place)
    queries = build.op("aten.reshape.default", keys, [rows, 1, tokens, 1])
    mask = build.op("aten.le.Tensor", keys, queries)
    build.output(build.op("aten.scaled_dot_product_attention.default", q, q, q, mask))
    after = simplify_masks(build.build())
    assert attention_call(after) == ((None,), (("is_causal", True),))


class TwoTables(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Embedding(9, 4), nn.Embedding(9, 4)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        return F.mse_loss(self.one(ids), self.two(labels))


def test_one_tensor_given_twice_is_two_inputs() -> None:
    ids = torch.randint(9, (3, 5))
    graph = capture(TwoTables(), (ids, ids), mode=Mode.TRAIN).graph
    reads = {graph.values[value].origin for node in graph.nodes for value in node.inputs}
    assert {"args[0]", "args[1]"} <= reads
