from __future__ import annotations

from dataclasses import replace

import pytest

from cutset.compiler.ir.errors import UsageError
from cutset.compiler.ir.graph import Graph, Mode
from cutset.compiler.ir.plan import Plan, Stage
from cutset.compiler.ir.verify import verify_plan
from cutset.cost_models.presets import local_cpu_cluster
from cutset.passes.pipeline import PlanOptions, plan_graph
from cutset.passes.transfer import held_stages, transfer
from tests.ir.builders import GraphBuilder, mlp, residual, tied_embedding


def planned(graph: Graph, num_stages: int, **options: object) -> Plan:
    chosen = PlanOptions(num_stages=num_stages, num_microbatches=2, **options)  # type: ignore[arg-type]
    return plan_graph(graph, local_cpu_cluster(4), batch_size=8, options=chosen)


def check(plan: Plan, graph: Graph, stages: tuple[Stage, ...]) -> None:
    moved = replace(
        plan, mode=graph.mode, stages=stages, schedule=None, prediction=None, certificate=None
    )
    verify_plan(moved, graph)


def test_another_batch_size_keeps_every_node_in_its_stage() -> None:
    plan = planned(residual(4), 3)
    other = residual(4, batch=7)
    stages = transfer(plan, residual(4), other)
    assert stages == plan.stages
    check(plan, other, stages)


def test_inference_keeps_parameters_where_they_are() -> None:
    train, infer = mlp(6, width=32), mlp(6, width=32, mode=Mode.INFER)
    plan = planned(train, 3)
    stages = transfer(plan, train, infer)
    check(plan, infer, stages)
    before, after = held_stages(plan, train), held_stages(replace(plan, stages=stages), infer)
    assert before == after
    assert [stage.device for stage in stages] == [stage.device for stage in plan.stages]
    alone = transfer(plan, None, infer, before)  # other nodes may lie on either side of a cut
    check(plan, infer, alone)
    assert held_stages(replace(plan, stages=alone), infer) == before


def test_a_stage_that_only_computes_the_loss_is_left_out() -> None:
    train, infer = mlp(4), mlp(4, mode=Mode.INFER)
    plan = planned(train, 2)
    last = len(train.nodes) - 1
    parts = (tuple(range(last)), (last,))
    plan = replace(
        plan, stages=tuple(Stage(index, (index + 1,), nodes) for index, nodes in enumerate(parts))
    )
    stages = transfer(plan, train, infer)
    assert stages == (Stage(0, (1,), tuple(range(len(infer.nodes)))),)


def without_dropout(num_blocks: int, width: int = 8) -> Graph:
    """`residual` as eval mode runs it, without its loss."""
    build = GraphBuilder("residual", Mode.INFER)
    first = hidden = build.input("x", (4, width))
    for block in range(num_blocks):
        weight = build.parameter(f"blocks.{block}.weight", (width, width))
        path = f"blocks.{block}"
        branch = build.op("aten.linear.default", hidden, weight, module=path)
        hidden = build.op("aten.add.Tensor", hidden, branch, module=path)
        if block == 0:
            first = hidden
    build.output(build.op("aten.add.Tensor", hidden, first, alpha=0.5))
    return build.build()


def test_nodes_without_parameters_follow_the_planned_graph() -> None:
    train, infer = residual(6), without_dropout(6)
    pins = tuple((f"blocks.{block}", block // 2) for block in range(6))
    plan = planned(train, 3, pins=pins)
    stages = transfer(plan, train, infer)
    check(plan, infer, stages)
    home = {node: stage.index for stage in stages for node in stage.nodes}
    for node in infer.nodes:
        if node.module_path:
            assert home[node.id] == int(node.module_path.split(".")[1]) // 2


def test_tied_parameters_and_masks_are_found_in_each_stage() -> None:
    graph = tied_embedding()
    plan = planned(graph, 2, pins=(("wte", 0), ("head", 1)))
    stages = transfer(plan, graph, tied_embedding(batch=3, length=7))
    check(plan, tied_embedding(batch=3, length=7), stages)
    assert held_stages(plan, graph)["head.weight"] == (0, 1)


def test_a_parameter_that_is_needed_after_its_stage_is_refused() -> None:
    build = GraphBuilder("backwards", Mode.INFER)
    hidden = build.input("x", (4, 8))
    for block in (1, 0):
        weight = build.parameter(f"layers.{block}.weight", (8, 8))
        hidden = build.op("aten.linear.default", hidden, weight, module=f"layers.{block}")
    build.output(hidden)
    plan = planned(mlp(2), 2, pins=(("layers.0", 0), ("layers.1", 1)))
    with pytest.raises(UsageError, match=r"holds layers.0.weight in stages \(0,\)"):
        transfer(plan, mlp(2), build.build())
