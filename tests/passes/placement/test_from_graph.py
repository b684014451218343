"""A captured graph and a cluster as a workload: times, transfers, sizes, pins, blocks."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cutset.compiler.ir.cluster import Cluster, Device, DeviceType, Link, LinkRule
from cutset.compiler.ir.errors import InfeasibleError, UsageError
from cutset.compiler.ir.graph import Graph, Mode, OutputKind, ValueKind
from cutset.cost_models.ops import price
from cutset.passes.context import Measured
from cutset.passes.placement.from_graph import state_workload
from tests.ir.builders import GraphBuilder, mlp, residual, tied_embedding

FAST = DeviceType("fast", "cpu", 1 << 20, 1e12, (("f32", 1e12),), 1e-6)
SLOW = DeviceType("slow", "cpu", 1 << 30, 1e10, (("f32", 1e10),), 1e-6)
SLOW_LINK = Link(1e-3, 1e6)
QUICK_LINK = Link(1e-5, 1e9)


def mixed(*, fast: DeviceType = FAST, slow: DeviceType = SLOW) -> Cluster:
    """Two fast devices in one node, a slow one in another."""
    devices = (Device(0, "fast", "a"), Device(1, "slow", "b"), Device(2, "fast", "a"))
    links = (LinkRule(QUICK_LINK, same_node=True), LinkRule(SLOW_LINK))
    return Cluster("mixed", (fast, slow), devices, links)


def test_operators_have_the_times_of_each_type_and_the_worst_link() -> None:
    graph = mlp(2, mode=Mode.INFER)
    stated = state_workload(graph, mixed(), rows=4)
    kinds = stated.workload.kinds
    assert [(kind.count, kind.memory) for kind in kinds] == [(2, 1 << 20), (1, 1 << 30)]
    assert stated.devices == (0, 2, 1)
    prices = [price(graph, entry) for entry in (FAST, SLOW)]
    for (node,), operator in zip(stated.units, stated.workload.operators, strict=True):
        assert operator.times == tuple(row[node].forward_seconds for row in prices)
        sent = graph.values[graph.nodes[node].outputs[0]].type.num_bytes
        is_read = any(graph.nodes[node].outputs[0] in other.inputs for other in graph.nodes)
        wanted = SLOW_LINK.seconds(sent) if is_read else 0.0
        assert operator.transfers == (wanted, wanted)
    total = sum(v.type.num_bytes for v in graph.values_of(ValueKind.PARAMETER))
    assert sum(operator.size for operator in stated.workload.operators) == total


def test_a_larger_microbatch_scales_times_and_transfers_but_not_sizes() -> None:
    graph = mlp(2, width=256, mode=Mode.INFER)
    few, many = (state_workload(graph, mixed(), rows=rows).workload.operators for rows in (4, 8))
    for small, large in zip(few, many, strict=True):
        assert large.size == small.size
        sent = [operator.transfers[0] - SLOW_LINK.latency_seconds for operator in (small, large)]
        assert sent[1] == pytest.approx(2 * sent[0]) or max(sent) < 0
    assert sum(o.times[1] or 0 for o in many) > sum(o.times[1] or 0 for o in few)


def test_what_was_measured_replaces_the_model() -> None:
    graph = mlp(1, mode=Mode.INFER)
    nodes = {name: tuple(float(i) for i in range(len(graph.nodes))) for name in ("fast", "slow")}
    measured = Measured(nodes, {"fast": Link(1.0, 1e9), "slow": Link(2.0, 1e9)})
    operators = state_workload(graph, mixed(), rows=4, measured=measured).workload.operators
    assert [operator.times for operator in operators] == [
        (float(i),) * 2 for i in range(len(nodes["fast"]))
    ]
    assert [round(t) for t in operators[0].transfers] == [1, 2]
    on_its_way = state_workload(graph, mixed(), rows=4, measured=measured, overlaps=False)
    assert on_its_way.workload.operators[0].transfers[0] == pytest.approx(SLOW_LINK.seconds(128))


def test_an_operator_that_a_type_lacks_has_no_time_there() -> None:
    graph = mlp(2, mode=Mode.INFER)
    lacking = replace(FAST, unsupported_ops=("aten.relu.default",))
    stated = state_workload(graph, mixed(fast=lacking), rows=4)
    for (node,), operator in zip(stated.units, stated.workload.operators, strict=True):
        assert (operator.times[0] is None) == (graph.nodes[node].op.name == "aten.relu.default")


def test_an_operator_that_no_device_can_run_is_named() -> None:
    lacking = {"unsupported_ops": ("aten.relu.default",)}
    cluster = mixed(fast=replace(FAST, **lacking), slow=replace(SLOW, **lacking))
    with pytest.raises(InfeasibleError) as refusal:
        state_workload(mlp(2, mode=Mode.INFER), cluster, rows=4)
    assert "no device can run aten.relu.default" in refusal.value.cause
    assert "fast lacks aten.relu.default; slow lacks aten.relu.default" in refusal.value.cause


def test_pins_leave_one_device() -> None:
    graph = mlp(3, mode=Mode.INFER)
    stated = state_workload(graph, mixed(), rows=4, pins=(("layers.1", 2),))
    assert stated.devices == (0, 1, 2)
    for (node,), operator in zip(stated.units, stated.workload.operators, strict=True):
        pinned = graph.nodes[node].module_path == "layers.1"
        assert [time is not None for time in operator.times] == (
            [False, False, True] if pinned else [True] * 3
        )


@pytest.mark.parametrize(
    ("pins", "cause"),
    [
        ((("layers.9", 0),), "matches no module"),
        ((("layers.1", 7),), "device 7, which the cluster does not have"),
        ((("layers.1", 0), ("layers.*", 1)), "on two devices, 0 and 1"),
    ],
)
def test_pins_that_cannot_hold_are_refused(pins: tuple[tuple[str, int], ...], cause: str) -> None:
    with pytest.raises(UsageError, match=cause):
        state_workload(mlp(3, mode=Mode.INFER), mixed(), rows=4, pins=pins)


@pytest.mark.parametrize("graph", [mlp(6, mode=Mode.INFER), residual(4)], ids=["mlp", "residual"])
def test_blocks_are_whole_and_wait_for_each_other_in_one_direction(graph: Graph) -> None:
    single = state_workload(graph, mixed(), rows=4)
    blocks = state_workload(graph, mixed(), rows=4, granularity="block")
    assert len(blocks.units) < len(single.units)
    assert sorted(node for unit in blocks.units for node in unit) == sorted(
        node for unit in single.units for node in unit
    )
    for kind in range(2):
        times = [
            sum(operator.times[kind] or 0.0 for operator in stated.workload.operators)
            for stated in (single, blocks)
        ]
        assert times[0] == pytest.approx(times[1])


def test_a_tied_parameter_counts_wherever_it_is_read() -> None:
    graph = tied_embedding()
    stated = state_workload(graph, mixed(), rows=2)
    held = [operator.size for operator in stated.workload.operators if operator.size]
    tied, mixer = (v.type.num_bytes for v in graph.values_of(ValueKind.PARAMETER))
    assert held == [tied, mixer, tied]
    assert all(operator.colour is None for operator in stated.workload.operators)


def test_state_stays_with_what_reads_and_changes_it() -> None:
    build = GraphBuilder("counter", Mode.INFER)
    x = build.input("x", (4, 8))
    seen = build.buffer("seen", (8,))
    scaled = build.op("aten.mul.Tensor", x, seen)
    new = build.op("aten.add.Tensor", seen, build.op("aten.mean.dim", x, (0,)))
    build.output(new, OutputKind.BUFFER, target="seen")
    build.output(scaled)
    graph = build.build()
    stated = state_workload(graph, mixed(), rows=4)
    colours = {
        graph.nodes[node].op.packet: operator.colour
        for (node,), operator in zip(stated.units, stated.workload.operators, strict=True)
    }
    assert colours["mul"] == colours["add"] is not None
    assert colours["mean"] is None
