from __future__ import annotations

from collections.abc import Hashable, Mapping

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cutset.compiler.ir.graph import Graph, Mode, OutputKind, producers
from cutset.passes.coarsen import Coarsening, coarsen
from cutset.passes.replicate import replicated_nodes
from tests.ir.builders import GraphBuilder, mlp, residual, tied_embedding


def units_of(
    graph: Graph, *, max_units: int = 150, labels: Mapping[int, Hashable] | None = None
) -> tuple[tuple[int, ...], ...]:
    seconds = [1e-9 if node.op.packet in ("relu", "view") else 1.0 for node in graph.nodes]
    how = Coarsening(seconds, num_stages=2, max_units=max_units, labels=labels or {})
    keep = [node.id for node in graph.nodes if node.id not in replicated_nodes(graph)]
    return coarsen(graph, keep, how)


def check_legal(graph: Graph, units: tuple[tuple[int, ...], ...]) -> None:
    """Each node is in one unit, and values flow from earlier units to later ones only."""
    place = {node: index for index, unit in enumerate(units) for node in unit}
    assert sorted(place) == sorted(node for unit in units for node in unit)
    assert set(place) == {node.id for node in graph.nodes} - replicated_nodes(graph)
    made_by = producers(graph)
    for node, index in place.items():
        for value in graph.nodes[node].inputs:
            assert place.get(made_by.get(value, -1), -1) <= index


@pytest.mark.parametrize("graph", [mlp(), residual(5), tied_embedding()], ids=lambda g: g.name)
@pytest.mark.parametrize("max_units", [3, 150])
def test_units_partition_the_graph_in_topological_order(graph: Graph, max_units: int) -> None:
    check_legal(graph, units_of(graph, max_units=max_units))


def test_a_cheap_node_joins_its_neighbour_and_an_expensive_one_does_not() -> None:
    graph = mlp(3)
    names = [[graph.nodes[node].op.packet for node in unit] for unit in units_of(graph)]
    assert names == [["linear", "relu"]] * 3 + [["mse_loss"]]


def test_long_graphs_are_cut_where_least_crosses() -> None:
    graph = residual(40)
    units = units_of(graph, max_units=45)
    check_legal(graph, units)
    assert 40 <= len(units) <= 45
    blocks = [[graph.nodes[node].op.packet for node in unit] for unit in units[4:-2]]
    assert blocks == [["linear", "dropout", "add"]] * 38  # where the branch does not cross


def test_nodes_of_different_pins_are_never_in_one_unit() -> None:
    graph = residual(40)
    labels = {node.id: "pinned" for node in graph.nodes if node.module_path == "blocks.7"}
    for max_units in (6, 150):
        for unit in units_of(graph, max_units=max_units, labels=labels):
            assert len({labels.get(node) for node in unit}) == 1


def test_nodes_that_touch_a_changing_buffer_stay_together_with_what_lies_between() -> None:
    build = GraphBuilder("statistics", Mode.TRAIN)
    hidden = build.input("x", (4, 8))
    mean = build.buffer("norm.mean", (8,))
    weight = build.parameter("weight", (8, 8))
    centred = build.op("aten.sub.Tensor", hidden, mean)
    between = build.op("aten.linear.default", centred, weight)
    update = build.op("aten.mean.dim", between, [0])
    build.output(update, OutputKind.BUFFER, target="norm.mean", batch_dim=None)
    after = build.op("aten.linear.default", between, weight)
    build.loss(build.op("aten.mean.default", after))
    graph = build.build()
    units = units_of(graph)
    check_legal(graph, units)
    assert units[0] == (0, 1, 2)


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    """Random DAGs of linear, relu and add on vectors of one width."""
    build = GraphBuilder("random", Mode.TRAIN)
    values = [build.input("x", (2, 4))]
    for index in range(draw(st.integers(3, 25))):
        pick = st.integers(max(0, len(values) - 4), len(values) - 1)
        first, second = values[draw(pick)], values[draw(pick)]
        match draw(st.sampled_from(("linear", "relu", "add"))):
            case "linear":
                weight = build.parameter(f"w{index}", (4, 4))
                values.append(build.op("aten.linear.default", first, weight))
            case "relu":
                values.append(build.op("aten.relu.default", first))
            case _:
                values.append(build.op("aten.add.Tensor", first, second))
    build.loss(build.op("aten.mean.default", values[-1]))
    return build.build()


@settings(max_examples=50)
@given(graphs(), st.integers(2, 12))
def test_units_of_random_graphs_are_acyclic(graph: Graph, max_units: int) -> None:
    units = units_of(graph, max_units=max_units)
    check_legal(graph, units)
    place = {node: index for index, unit in enumerate(units) for node in unit}
    made_by = producers(graph)
    edges = {
        (place[made_by[value]], place[node])
        for node in place
        for value in graph.nodes[node].inputs
        if made_by.get(value) in place
    }
    digraph = nx.DiGraph(edge for edge in edges if edge[0] != edge[1])
    assert nx.is_directed_acyclic_graph(digraph)
