"""Graphs as networkx graphs."""

from __future__ import annotations

import networkx as nx

from cutset.compiler.ir.views import event_view, graph_view, stage_view
from tests.ir.pipelines import make_plan, make_programs, skip_graph


def test_graph_view_has_the_edges_of_the_graph() -> None:
    graph = skip_graph()
    view = graph_view(graph)
    assert sorted(view) == [node.id for node in graph.nodes]
    assert nx.is_directed_acyclic_graph(view)
    first = next(node.id for node in graph.nodes if node.name == "first")
    add = next(node.id for node in graph.nodes if node.name == "add")
    assert view.edges[first, add] == {"values": ("first",), "num_bytes": 64}
    assert view.nodes[first]["op"] == "aten.linear.default"
    assert view.nodes[first + 1]["module_path"] == "blocks.1"


def test_stage_view_sends_values_straight_to_their_readers() -> None:
    graph = skip_graph()
    view = stage_view(make_plan(graph), graph)
    assert {edge: view.edges[edge]["values"] for edge in view.edges} == {
        (0, 1): ("m1",),
        (0, 2): ("first",),
        (1, 2): ("h3",),
    }
    assert view.nodes[1] == {"device": 1, "num_nodes": 4}


def test_event_view_of_right_programs_is_acyclic_and_complete() -> None:
    programs = make_programs()
    view = event_view(programs)
    assert len(view) == sum(len(program.instructions) for program in programs)
    assert nx.is_directed_acyclic_graph(view)
    last = {rank: (rank, len(p.instructions) - 1) for rank, p in enumerate(programs)}
    first_forward = next(event for event in view if view.nodes[event]["text"] == "Forward 0.0")
    assert all(nx.has_path(view, first_forward, event) for event in last.values())
