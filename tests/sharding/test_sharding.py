"""The tables of a sharding: which strategy a node has, and what is legal at other sizes."""

from __future__ import annotations

import pytest
import torch

from cutset.compiler.ir.errors import VerificationError
from cutset.compiler.ir.graph import Graph
from cutset.compiler.ir.mesh import Layout, Mesh
from cutset.compiler.ir.plan import NodeLayout
from cutset.compiler.sharding.sharding import legal_node_layouts, make_sharding
from tests.ir.builders import GraphBuilder


def layouts(*texts: str) -> tuple[Layout, ...]:
    return tuple(map(Layout.parse, texts))


def linear(rows: int) -> Graph:
    build = GraphBuilder("linear")
    weight = build.parameter("weight", (6, 4))
    build.output(build.op("aten.linear.default", build.input("x", (rows, 4)), weight))
    return build.build()


def test_what_is_too_small_for_one_axis_still_runs_over_the_other() -> None:
    mesh = Mesh.parse("data=2,tensor=2")
    group = NodeLayout((0,), layouts("[S(0),R]", "[R,S(0)]"), layouts("[S(0),S(1)]"))
    assert legal_node_layouts(linear(4), mesh, (group,)) == (group,)
    (kept,) = legal_node_layouts(linear(1), mesh, (group,))
    assert kept == NodeLayout((0,), layouts("[R,R]", "[R,S(0)]"), layouts("[R,S(1)]"))
    make_sharding(linear(1), mesh, (kept,))
    only_rows = NodeLayout((0,), layouts("[S(0),R]", "[R,R]"), layouts("[S(0),R]"))
    assert make_sharding(linear(1), mesh, legal_node_layouts(linear(1), mesh, (only_rows,)))


def test_illegal_layouts_are_refused_with_the_legal_ones() -> None:
    group = NodeLayout((0,), layouts("[S(0)]", "[S(0)]"), layouts("[S(0)]"))
    with pytest.raises(VerificationError, match="cannot run as") as caught:
        make_sharding(linear(4), Mesh.parse("tensor=2"), (group,))
    assert "R,S(0) -> S(1)" in str(caught.value)


def test_nodes_that_look_alike_may_point_to_other_places() -> None:
    """Only rows of indices that count from zero stay within their part of the tensor."""
    build = GraphBuilder("rows")
    x = build.input("x", (4, 6))
    ids = build.input("ids", (4,), torch.int64)
    counted = build.op("aten.arange.default", 4)
    for rows in (counted, ids):
        build.output(build.op("aten.index.Tensor", x, (rows, ids)))
    graph = build.build()
    own = NodeLayout((1,), layouts("[S(0)]", "[S(0)]", "[S(0)]"), layouts("[S(0)]"))
    mesh = Mesh.parse("tensor=2")
    make_sharding(graph, mesh, (own,))
    other = NodeLayout((2,), layouts("[S(0)]", "[S(0)]"), layouts("[S(0)]"))
    with pytest.raises(VerificationError, match="cannot run as"):
        make_sharding(graph, mesh, (own, other))
