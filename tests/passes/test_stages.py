from __future__ import annotations

import re
from dataclasses import replace

import pytest
from torch.nn import functional as F

from cutset.compiler.api import plan_model
from cutset.compiler.ir.cluster import Cluster, Device, DeviceType, Link, LinkRule
from cutset.compiler.ir.errors import InfeasibleError, UsageError
from cutset.compiler.ir.graph import Graph, Mode, ValueKind
from cutset.compiler.ir.plan import OptimizerModel, Plan
from cutset.cost_models import parse_devices
from cutset.cost_models.presets import local_cpu_cluster
from cutset.passes.pipeline import PlanOptions, plan_graph
from tests.compiler.partitioned import batch, chain
from tests.ir.builders import GraphBuilder, mlp, residual, tied_embedding

ADAMW = OptimizerModel("adamw", 2.0)


def plan(graph: Graph, devices: int | Cluster, batch_size: int = 16, **options: object) -> Plan:
    cluster = local_cpu_cluster(devices) if isinstance(devices, int) else devices
    chosen = PlanOptions(**options)  # type: ignore[arg-type]
    return plan_graph(graph, cluster, batch_size=batch_size, options=chosen)


def state_bytes(graph: Graph) -> int:
    """Parameters, gradients and AdamW states."""
    return 4 * sum(value.type.num_bytes for value in graph.values_of(ValueKind.PARAMETER))


def test_stages_are_balanced_where_compute_dominates() -> None:
    graph = mlp(8, width=512, batch=64)
    found = plan(graph, 4, 64 * 16, num_microbatches=16, num_stages=4)
    assert found.prediction is not None and found.certificate is not None
    forward, backward = (
        found.prediction.stage_forward_seconds,
        found.prediction.stage_backward_seconds,
    )
    seconds = [sum(both) for both in zip(forward, backward, strict=True)]
    assert len(seconds) == 4
    assert max(seconds) <= 1.15 * sum(seconds) / 4
    assert found.certificate.gap <= 1e-3


def test_fewer_stages_than_devices_where_messages_cost_more_than_they_save() -> None:
    assert len(plan(mlp(4, width=8, mode=Mode.INFER), 4, num_microbatches=1).stages) == 1


def test_a_model_three_times_too_large_for_one_device_is_refused_there_and_planned_on_four() -> (
    None
):
    graph = mlp(12, width=128, batch=4)
    limit = state_bytes(graph) // 3
    with pytest.raises(InfeasibleError) as refusal:
        plan(graph, 1, memory_limit_bytes=limit)
    message = str(refusal.value)
    assert re.search(r"stage memory: \S+ MiB needed on device 0 \(cpu-core\) for layers.0", message)
    assert re.search(r"\S+ MiB available: short by \S+ MiB", message)
    found = plan(graph, 4, memory_limit_bytes=limit)
    assert len(found.stages) == 4
    assert found.prediction is not None
    assert all(entry.total_bytes <= limit for entry in found.prediction.memory)


def test_the_ways_out_that_are_named_work() -> None:
    graph = mlp(12, width=128, batch=4)
    limit = state_bytes(graph) // 3
    with pytest.raises(InfeasibleError) as refusal:
        plan(graph, 2, memory_limit_bytes=limit)
    ways = refusal.value.ways_out
    number = next(re.match(r"(\d+) devices", way) for way in ways if "devices of" in way)
    assert number is not None
    assert plan(graph, int(number[1]), memory_limit_bytes=limit).stages
    assert any("SGD" in way for way in ways)
    lean = OptimizerModel("sgd", 0.0)
    assert plan(graph, 2, memory_limit_bytes=limit, optimizer=lean).stages


@pytest.mark.parametrize("pinned", [{"num_stages": 2}, pytest.param({}, marks=pytest.mark.slow)])
def test_more_microbatches_are_proposed_where_activations_are_too_large(
    pinned: dict[str, object],
) -> None:
    graph = mlp(6, width=16, batch=512)
    asked = {"memory_limit_bytes": 400_000, "recompute": "none", **pinned}
    with pytest.raises(InfeasibleError) as refusal:
        plan(graph, 2, 4096, num_microbatches=8, **asked)
    number = next(
        match
        for way in refusal.value.ways_out
        if (match := re.match(r"(\d+) microbatches instead of 8", way))
    )
    assert plan(graph, 2, 4096, num_microbatches=int(number[1]), **asked).stages
    assert plan(graph, 2, 4096, **asked).num_microbatches > 8


def two_speeds() -> Cluster:
    """A slow device with much memory, then a fast one with little."""
    rates = (("f32", 1e9),), (("f32", 4e9),)
    return Cluster(
        "two speeds",
        (
            DeviceType("slow", "cpu", 1 << 30, 1e12, rates[0]),
            DeviceType("fast", "cpu", 1 << 20, 1e12, rates[1]),
        ),
        (Device(0, "slow", "a"), Device(1, "fast", "a")),
        (LinkRule(Link(1e-6, 1e12)),),
    )


def test_faster_devices_get_more_work() -> None:
    found = plan(mlp(10, width=64, batch=16), two_speeds(), 16 * 32, num_microbatches=32)
    nodes = {stage.device: len(stage.nodes) for stage in found.stages}
    assert nodes[1] > 2.5 * nodes[0]


def test_work_that_does_not_fit_on_the_fast_device_goes_to_the_slow_one() -> None:
    graph = mlp(10, width=128, batch=16)
    assert state_bytes(graph) > 1 << 20
    found = plan(graph, two_speeds(), 16 * 32, num_microbatches=32)
    nodes = {stage.device: len(stage.nodes) for stage in found.stages}
    assert nodes[0] > nodes[1]


def test_an_op_that_no_device_has_is_named() -> None:
    slow = two_speeds()
    kind = DeviceType("slow", "cpu", 1 << 30, 1e12, (("f32", 1e9),), 0.0, ("aten.relu.default",))
    lame = Cluster("lame", (kind,), slow.devices[:1], slow.links)
    with pytest.raises(InfeasibleError, match=r"no device of cluster 'lame' can run .*aten.relu"):
        plan(mlp(), lame)


def test_pins_hold() -> None:
    graph = residual(6, width=64)
    stages = plan(graph, 3, num_stages=3, pins=(("blocks.4", 1), ("blocks.5", 2))).stages
    home = {node: stage.index for stage in stages for node in stage.nodes}
    for node in graph.nodes:
        expected = {"blocks.4": 1, "blocks.5": 2}.get(node.module_path)
        assert expected is None or home[node.id] == expected
    stages = plan(graph, 3, num_stages=2, device_pins=(("blocks.0", 2),)).stages
    assert stages[0].device == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pins": (("nothing.like.this", 0),)}, "matches no module"),
        ({"num_stages": 9}, "9 stages wanted of 3 devices"),
        ({"num_microbatches": 5}, "5 microbatches do not divide a batch of 16"),
        ({"pins": (("blocks.1", 0), ("blocks.*", 1))}, "on two stages"),
        ({"device_pins": (("blocks.1", 7),)}, "device 7, which the cluster does not have"),
    ],
)
def test_contradictions_are_the_users_to_fix(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        plan(residual(6), 3, **options)


def test_a_tied_parameter_is_counted_at_each_stage_that_holds_it() -> None:
    graph = tied_embedding(vocabulary=4096, width=64)
    found = plan(graph, 2, num_stages=2, pins=(("wte", 0), ("head", 1)))
    assert found.prediction is not None
    tied = 4096 * 64 * 4
    assert all(entry.parameters_bytes >= tied for entry in found.prediction.memory)


def test_replicated_nodes_stand_in_each_stage_that_needs_them() -> None:
    build = GraphBuilder("masked", Mode.TRAIN)
    hidden = build.input("x", (4, 8))
    mask = build.op("aten.ones.default", (8,), name="mask")
    for index in range(4):
        weight = build.parameter(f"w{index}", (8, 8))
        hidden = build.op("aten.linear.default", hidden, weight, module=f"layers.{index}")
        hidden = build.op("aten.mul.Tensor", hidden, mask, module=f"layers.{index}")
    build.loss(build.op("aten.mean.default", hidden))
    graph = build.build()
    stages = plan(graph, 2, num_stages=2).stages
    assert all(0 in stage.nodes for stage in stages)


def test_a_graph_that_costs_nothing_still_has_a_plan() -> None:
    build = GraphBuilder("view", Mode.INFER)
    hidden = build.input("x", (4, 8))
    build.output(build.op("aten.view.default", hidden, (8, 4)))
    found = plan(build.build(), 2, 4)
    assert [stage.nodes for stage in found.stages] == [(0,)]
    assert found.certificate is not None and found.certificate.gap == 0.0


@pytest.mark.parametrize(
    ("mesh", "zero"),
    [
        ("data=2,pipeline=2", 0),
        ("data=2,pipeline=2", 1),
        ("data=2,pipeline=2", 3),
        ("pipeline=2,tensor=2", 0),
    ],
)
@pytest.mark.parametrize("skew_seconds", [0.0, 1e-3, 0.1])
def test_no_stage_has_collectives_alone(mesh: str, zero: int, skew_seconds: float) -> None:
    """However long they take beside the few operators of the model."""
    cluster = parse_devices("cpu:4")
    cluster = replace(
        cluster, links=tuple(replace(rule, skew_seconds=skew_seconds) for rule in cluster.links)
    )
    planned = plan_model(
        chain(),
        cluster,
        example_inputs=batch(),
        loss_fn=F.mse_loss,
        num_microbatches=2,
        mesh=mesh,
        zero=zero,
        check=False,
    )
    assert len(planned.plan.stages) == 2
    assert all(stage.nodes for stage in planned.plan.stages)
