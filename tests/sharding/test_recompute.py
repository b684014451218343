"""What a rank computes again of its local graph."""

from __future__ import annotations

from cutset.compiler.ir.graph import Graph, Mode
from cutset.compiler.ir.mesh import Layout, Mesh
from cutset.compiler.ir.plan import NodeLayout, ParameterLayout
from cutset.compiler.sharding.localize import LocalPart, localize
from cutset.compiler.sharding.recompute import recomputed_locally
from cutset.compiler.sharding.sharding import make_sharding
from tests.ir.builders import GraphBuilder

MESH = Mesh.parse("tensor=2")
S0, S1, R, P = (Layout.parse(text) for text in ("[S(0)]", "[S(1)]", "[R]", "[P(sum)]"))


def feed_forward(mode: Mode = Mode.TRAIN) -> Graph:
    """linear (0), gelu (1), linear (2), tanh (3), mean (4)."""
    build = GraphBuilder("mlp", mode)
    x = build.input("x", (4, 8))
    first, second = build.parameter("first", (16, 8)), build.parameter("second", (8, 16))
    wide = build.op("aten.gelu.default", build.op("aten.linear.default", x, first))
    out = build.op("aten.tanh.default", build.op("aten.linear.default", wide, second))
    last = build.op("aten.mean.default", out)
    if mode is Mode.TRAIN:
        build.loss(last)
    else:
        build.output(last)
    return build.build()


def part(graph: Graph, *, parallel: bool, held: Layout = R) -> LocalPart:
    """Columns, then rows of the linears over `tensor`; or whole linears with `first` as held."""
    layouts = (
        NodeLayout((0,), (R, S0), (S1,)),
        NodeLayout((1,), (S1,), (S1,)),
        NodeLayout((2,), (S1, S1), (P,)),
    )
    parameters = [("first", S0), ("second", S1)] if parallel else [("first", held)]
    sharding = make_sharding(
        graph,
        MESH,
        layouts if parallel else (),
        (),
        tuple(ParameterLayout(name, item, item, item) for name, item in parameters),
    )
    return localize(graph, sharding, (0,))


def chosen(local: LocalPart, nodes: tuple[int, ...]) -> list[str]:
    return [local.graph.nodes[node].op.packet for node in recomputed_locally(local, nodes)]


def test_sums_over_ranks_are_kept() -> None:
    local = part(feed_forward(), parallel=True)
    packets = [node.op.packet for node in local.graph.nodes]
    assert "all_reduce" in packets
    assert chosen(local, (0, 1, 2, 3)) == [p for p in packets if p not in ("all_reduce", "mean")]
    assert chosen(local, ()) == []


def test_a_conversion_that_others_read_too_is_kept() -> None:
    local = part(feed_forward(), parallel=True)
    assert "sum_gradient" not in chosen(local, (1,))


def test_gathered_parameters_run_again_always_but_in_inference() -> None:
    local = part(feed_forward(), parallel=False, held=S1)
    assert chosen(local, ()) == ["all_gather"]
    assert chosen(local, (3,)) == ["all_gather", "tanh"]
    inference = part(feed_forward(Mode.INFER), parallel=False, held=S1)
    assert chosen(inference, ()) == []


def test_what_is_computed_from_gathered_parameters_alone_runs_again() -> None:
    build = GraphBuilder("cast", Mode.TRAIN)
    x, weight = build.input("x", (4, 8)), build.parameter("first", (8, 8))
    scaled = build.op("aten.mul.Tensor", weight, 2.0)
    build.loss(build.op("aten.mean.default", build.op("aten.linear.default", x, scaled)))
    assert chosen(part(build.build(), parallel=False, held=S0), ()) == ["all_gather", "mul"]
