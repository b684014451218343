"""Which gradients stay terms until the end of the step."""

from __future__ import annotations

from cutset.compiler.ir.graph import Graph, Mode, Value
from cutset.compiler.ir.mesh import Layout, Mesh
from cutset.compiler.ir.plan import NodeLayout
from cutset.compiler.sharding.sharding import make_sharding
from tests.ir.builders import GraphBuilder

MESH = Mesh.parse("tensor=2")
ROWS = (("[S(0)]", "[R]"), ("[S(0)]",))
COLUMNS = (("[R]", "[S(0)]"), ("[S(1)]",))


def two_readers(*, split: bool) -> Graph:
    """A weight whose two halves, or whose transpose and itself, are read by one linear each."""
    build = GraphBuilder("two", Mode.TRAIN)
    x = build.input("x", (4, 4))
    weight = build.parameter("weight", (8, 4) if split else (4, 4))
    halves: tuple[Value, ...]
    if split:
        halves = build.ops("aten.split_with_sizes.default", weight, (4, 4))
    else:
        halves = (build.op("aten.t.default", weight), weight)
    first, second = (build.op("aten.linear.default", x, half) for half in halves)
    build.loss(build.op("aten.mean.default", build.op("aten.add.Tensor", first, second)))
    return build.build()


def deferred(graph: Graph, *choices: tuple[tuple[str, ...], tuple[str, ...]]) -> set[str]:
    """Values whose gradient is deferred when the linears run so."""
    linears = [node.id for node in graph.nodes if node.op.packet == "linear"]
    layouts = tuple(
        NodeLayout((number,), *(tuple(map(Layout.parse, side)) for side in choice))
        for number, choice in zip(linears, choices, strict=True)
    )
    return set(make_sharding(graph, MESH, layouts).deferred)


def test_readers_that_agree_defer_through_what_is_replicated() -> None:
    graph = two_readers(split=True)
    names = {graph.values[v].name for v in graph.nodes[0].outputs}
    assert deferred(graph, ROWS, ROWS) == {"weight", *names}


def test_results_of_one_node_that_disagree_do_not_defer() -> None:
    # the whole gradient of the one half and terms of the other would meet in the weight
    assert deferred(two_readers(split=True), ROWS, COLUMNS) == set()


def test_a_value_made_of_one_that_does_not_defer_does_not_either() -> None:
    assert deferred(two_readers(split=False), ROWS, COLUMNS) == set()
