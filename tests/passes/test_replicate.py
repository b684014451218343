from __future__ import annotations

from cutset.compiler.ir.graph import Mode, OutputKind
from cutset.passes.replicate import needed_replicas, replicated_nodes
from tests.ir.builders import GraphBuilder, mlp, tied_embedding


def test_masks_are_replicated_and_what_depends_on_parameters_is_not() -> None:
    graph = tied_embedding()
    names = {graph.nodes[node].name for node in replicated_nodes(graph)}
    assert {"mask", "tril"} <= names
    assert not {"embedding", "linear"} & names


def test_each_stage_gets_the_replicas_it_needs_with_what_they_need() -> None:
    graph = tied_embedding()
    by_name = {node.name: node.id for node in graph.nodes}
    replicated = replicated_nodes(graph)
    attention = by_name["scaled_dot_product_attention"]
    needed = needed_replicas(graph, replicated, [attention])
    assert needed == (by_name["mask"], by_name["tril"])
    assert needed_replicas(graph, replicated, [by_name["embedding"]]) == ()


def test_a_node_that_writes_a_buffer_is_in_one_stage() -> None:
    build = GraphBuilder("counter", Mode.TRAIN)
    hidden = build.input("x", (4, 8))
    ones = build.op("aten.ones.default", (8,))
    build.buffer("seen", (8,))
    build.output(ones, OutputKind.BUFFER, target="seen", batch_dim=None)
    build.loss(build.op("aten.mean.default", build.op("aten.add.Tensor", hidden, ones)))
    assert replicated_nodes(build.build()) == frozenset()


def test_a_graph_of_nothing_else_is_not_replicated() -> None:
    build = GraphBuilder("table", Mode.INFER)
    build.output(build.op("aten.ones.default", (4,)))
    assert replicated_nodes(build.build()) == frozenset()
    assert replicated_nodes(mlp()) == frozenset()
