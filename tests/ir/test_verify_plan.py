"""Plans: right ones pass at every degree of completion, each broken one is caught."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from cutset.compiler.ir.errors import VerificationError
from cutset.compiler.ir.graph import Mode, OutputKind
from cutset.compiler.ir.mesh import Layout, Mesh
from cutset.compiler.ir.plan import OptimizerModel, Plan, ValueLayout
from cutset.compiler.ir.replicable import replicable_nodes
from cutset.compiler.ir.verify import verify_plan
from tests.ir.builders import GraphBuilder, tied_embedding
from tests.ir.pipelines import cluster, make_plan, one_f_one_b, skip_graph

GRAPH = skip_graph()
PLAN = make_plan(GRAPH)


def test_right_plans_pass() -> None:
    undecided = replace(
        PLAN, num_microbatches=0, stages=(), schedule=None, prediction=None, certificate=None
    )
    steps = (
        undecided,
        replace(undecided, num_microbatches=4, stages=PLAN.stages),
        replace(undecided, num_microbatches=4, stages=PLAN.stages, schedule=PLAN.schedule),
        PLAN,
    )
    for plan in steps:
        verify_plan(plan)
        verify_plan(plan, GRAPH)


def test_one_device_may_run_two_stages_where_the_schedule_says_so() -> None:
    schedule = PLAN.schedule
    assert schedule is not None
    first, second, third = PLAN.stages
    stages = (first, replace(second, devices=(0,)), replace(third, devices=(1,)))
    rows = ("F0.0 F1.0 F0.1 F1.1 B1.0 B0.0 B1.1 B0.1", "F2.0 B2.0 F2.1 B2.1")
    actions = tuple(tuple(map(type(schedule.ranks[0][0]).parse, row.split())) for row in rows)
    shared = replace(
        PLAN,
        stages=stages,
        num_microbatches=2,
        schedule=replace(schedule, num_microbatches=2, ranks=actions),
        prediction=None,
    )
    verify_plan(shared, GRAPH)
    with pytest.raises(VerificationError, match=r"stages \[0, 1\] stand on device 0"):
        verify_plan(replace(shared, schedule=None), GRAPH)


def stage(plan: Plan, position: int, /, **changes: object) -> Plan:
    stages = list(plan.stages)
    stages[position] = replace(stages[position], **changes)
    return replace(plan, stages=tuple(stages))


def prediction(plan: Plan, **changes: object) -> Plan:
    assert plan.prediction is not None
    return replace(plan, prediction=replace(plan.prediction, **changes))


def memory(plan: Plan, **changes: object) -> Plan:
    assert plan.prediction is not None
    first, *rest = plan.prediction.memory
    return prediction(plan, memory=(replace(first, **changes), *rest))


def certificate(plan: Plan, **changes: object) -> Plan:
    assert plan.certificate is not None
    return replace(plan, certificate=replace(plan.certificate, **changes))


# Nodes: 0 mask; 1 first, 2-3, in stage 0; 4-6 in stage 1; 7-10 in stage 2.
BROKEN: dict[str, tuple[Callable[[Plan], Plan], str]] = {
    "cluster": (lambda p: replace(p, cluster=replace(p.cluster, types=())), "unknown type"),
    "mesh": (lambda p: replace(p, mesh=Mesh.parse("a=1,a=1")), "two axes are called 'a'"),
    "batch size": (lambda p: replace(p, batch_size=0), "batch_size is 0"),
    "microbatches": (lambda p: replace(p, batch_size=3), "num_microbatches is 4 for a batch of 3"),
    "optimizer states": (
        lambda p: replace(p, optimizer=OptimizerModel("adamw", 1e308)),
        "keeps 1e+308 bytes of states",
    ),
    "mode": (lambda p: replace(p, mode=Mode.INFER), "a plan to infer for a graph to train"),
    "stage index": (lambda p: stage(p, 1, index=2), "its index is 2, not 1"),
    "device": (
        lambda p: stage(p, 1, devices=(3,)),
        "device 3 is not one of the cluster's 3 devices",
    ),
    "devices": (
        lambda p: stage(p, 1, devices=(1, 2)),
        "it has 2 devices for an in-stage mesh of 1",
    ),
    "empty stage": (lambda p: stage(p, 1, nodes=()), "the stage has no nodes"),
    "node order": (lambda p: stage(p, 1, nodes=(0, 5, 4, 6)), "its node ids do not ascend"),
    "node twice": (lambda p: stage(p, 1, nodes=(0, 4, 4, 5, 6)), "its node ids do not ascend"),
    "unknown node": (lambda p: stage(p, 2, nodes=(0, 7, 8, 9, 10, 11)), "node 11 is not one of"),
    "node forgotten": (lambda p: stage(p, 1, nodes=(0, 4, 6)), "the node is in no stage"),
    "mask forgotten everywhere": (
        lambda p: stage(stage(stage(p, 0, nodes=(1, 2, 3)), 1, nodes=(4, 5, 6)), 2, nodes=(7, 8)),
        "the node is in no stage",
    ),
    "node in two stages": (
        lambda p: stage(p, 2, nodes=(0, 6, 7, 8, 9, 10)),
        "the node is in stages [1, 2]",
    ),
    "backward edge": (
        lambda p: stage(stage(p, 0, nodes=(0, 1, 2, 3, 6)), 1, nodes=(0, 4, 5)),
        "stage 0 reads %m2, which stage 1 computes",
    ),
    "mask comes too late": (
        lambda p: stage(p, 0, nodes=(1, 2, 3)),
        "stage 0 reads %mask, which stage 1 computes",
    ),
    "unknown layout": (
        lambda p: replace(p, layouts=(ValueLayout("ghost", Layout(())),)),
        "has no value of this name",
    ),
    "wrong layout": (
        lambda p: replace(p, layouts=(ValueLayout("x", Layout.parse("[R]")),)),
        "layout [R] has 1 placements",
    ),
    "two layouts": (
        lambda p: replace(p, layouts=(ValueLayout("x", Layout(())),) * 2),
        "%x has two layouts",
    ),
    "schedule of other stages": (
        lambda p: replace(p, schedule=one_f_one_b(2, 4)),
        "it is for 2 stages, the plan has 3",
    ),
    "schedule of other microbatches": (
        lambda p: replace(p, schedule=one_f_one_b(3, 2)),
        "it is for 2 microbatches, the plan has 4",
    ),
    "schedule on other devices": (
        lambda p: stage(stage(p, 0, devices=(1,)), 1, devices=(0,)),
        "but stage 0 stands on device 1",
    ),
    "schedule of too many ranks": (
        lambda p: replace(p, schedule=replace(p.schedule, ranks=(*p.schedule.ranks, (), ()))),
        "it has 5 ranks, the cluster 3 devices",
    ),
    "illegal schedule": (
        lambda p: replace(p, schedule=replace(p.schedule, ranks=p.schedule.ranks[:2])),
        "is not scheduled",
    ),
    "stage seconds": (
        lambda p: prediction(p, stage_forward_seconds=(1.0,)),
        "stage_forward_seconds has 1 figures for 3 stages",
    ),
    "step seconds": (lambda p: prediction(p, step_seconds=float("nan")), "step_seconds has a"),
    "too much memory": (
        lambda p: memory(p, parameters_bytes=(1 << 20) + 1),
        "device 0 needs 1048817 bytes, 241 more than its 1048576",
    ),
    "seconds without end": (
        lambda p: prediction(p, stage_forward_seconds=(1e308,) * 3),
        "stage_forward_seconds adds up to no number",
    ),
    "memory of no device": (lambda p: memory(p, device=5), "memory of device 5"),
    "memory given twice": (lambda p: memory(p, device=1), "device 1 has two memory predictions"),
    "memory missing": (
        lambda p: prediction(p, memory=p.prediction.memory[1:]),
        "devices [0] have stages but no memory prediction",
    ),
    "recomputed node is missing": (lambda p: replace(p, recomputed=(3, 11)), "[11] do not exist"),
    "recomputed twice": (lambda p: replace(p, recomputed=(3, 3)), "nodes do not ascend: [3, 3]"),
    "bound above objective": (lambda p: certificate(p, lower_bound=2.0), "exceeds the objective"),
    "gap": (lambda p: certificate(p, gap=-0.5), "gap -0.5 is not between 0 and 1"),
    "no number": (lambda p: certificate(p, objective=float("inf")), "a figure is no number"),
}


@pytest.mark.parametrize("way", BROKEN)
def test_broken_plans_are_caught(way: str) -> None:
    mutate, message = BROKEN[way]
    with pytest.raises(VerificationError) as caught:
        verify_plan(mutate(PLAN), GRAPH)
    assert message in caught.value.cause
    assert caught.value.where


def test_a_value_may_be_sent_instead_of_recomputed() -> None:
    sent = stage(stage(PLAN, 1, nodes=(4, 5, 6)), 2, nodes=(7, 8, 9, 10))
    verify_plan(sent, GRAPH)


def test_what_may_be_replicated() -> None:
    graph = tied_embedding()
    names = [graph.nodes[node].name for node in sorted(replicable_nodes(graph))]
    assert names == ["mask", "tril", "view_1"]  # of factories and integer inputs only


def test_random_nodes_and_changed_buffers_may_not_be_replicated() -> None:
    build = GraphBuilder("buffers")
    kept, changed = build.buffer("kept", (4,)), build.buffer("changed", (4,))
    build.op("aten.neg.default", kept, name="of_kept")
    build.op("aten.rand.default", [4], name="random", random_draw=0)
    new = build.op("aten.neg.default", changed, name="of_changed")
    build.output(new, OutputKind.BUFFER, target="changed", batch_dim=None)
    graph = build.build()
    assert [graph.nodes[node].name for node in replicable_nodes(graph)] == ["of_kept"]


def test_figures_of_another_cluster_are_caught() -> None:
    small = replace(PLAN, cluster=cluster(3, memory_bytes=300))
    with pytest.raises(VerificationError, match="device 0 needs 304 bytes, 4 more than its 300"):
        verify_plan(small, GRAPH)
