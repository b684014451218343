"""What stages send each other keeps its name, whatever a rule computes it by."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cutset.compiler.codegen.programs import generate_programs
from cutset.compiler.ir.graph import Graph, Mode
from cutset.compiler.ir.mesh import Layout, Mesh, MeshAxis, Shard
from cutset.compiler.ir.plan import NodeLayout
from cutset.compiler.ir.verify import verify_programs
from cutset.compiler.sharding.rules import strategies_of
from tests.ir.builders import GraphBuilder
from tests.ir.pipelines import cluster, make_plan


def model() -> Graph:
    """A softmax, which helpers make if its dim is sharded."""
    build = GraphBuilder("boundaries", Mode.TRAIN)
    x, w = build.input("x", (4, 8)), build.parameter("w", (8, 8))
    h = build.op("aten.softmax.int", build.op("aten.linear.default", x, w), 1, name="weights")
    build.loss(build.op("aten.mean.default", build.op("aten.mul.Tensor", h, h)))
    return build.build()


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_every_cut_makes_right_programs(cut: int) -> None:
    graph, mesh = model(), Mesh.parse("tensor=2")
    layouts = []
    for node in graph.nodes[:3]:
        found = (s for s in strategies_of(graph, node, 2) if s.outputs == (Shard(1),))
        sides = ((s.inputs, s.outputs) for s in found)
        inputs, outputs = (tuple(Layout((p,)) for p in side) for side in next(sides))
        layouts.append(NodeLayout((node.id,), inputs, outputs))
    plan = make_plan(graph, 2, 2)
    first, second = plan.stages
    plan = replace(
        plan,
        cluster=cluster(4),
        mesh=Mesh((*mesh.axes, MeshAxis("pipeline", 2))),
        stages=(
            replace(first, devices=(0, 2), nodes=tuple(range(cut))),
            replace(second, devices=(1, 3), nodes=tuple(range(cut, len(graph.nodes)))),
        ),
        node_layouts=tuple(layouts),
        prediction=None,
    )
    programs = generate_programs(graph, plan, plan_hash="hash")
    verify_programs(programs)
    (sent,) = (name for name, _ in programs[0].stages[0].consumers)
    assert sent == graph.values[graph.nodes[cut - 1].outputs[0]].name
