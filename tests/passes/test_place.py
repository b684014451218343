"""Placement of operators as a pass: complete plans, memory, what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from cutset.compiler.ir.cluster import Cluster, Link
from cutset.compiler.ir.errors import InfeasibleError, UsageError
from cutset.compiler.ir.graph import Graph, Mode, ValueKind
from cutset.compiler.ir.mesh import Mesh
from cutset.compiler.ir.plan import Objective, Plan
from cutset.compiler.ir.text import parse_plan, print_plan
from cutset.compiler.ir.verify import verify_plan
from cutset.passes.context import Context, Measured
from cutset.passes.equal_split import equal_split
from cutset.passes.pipeline import PlanOptions, plan_graph
from cutset.passes.place import place_by_hand, preferred
from tests.exactness.placed import cpu_type, cpu_workers
from tests.ir.builders import mlp

FAST, SLOW = cpu_type("fast", 4e10), cpu_type("slow", 1e10)


def wide(layers: int = 6) -> Graph:
    return mlp(layers, width=256, batch=8, mode=Mode.INFER)


def place(graph: Graph, cluster: Cluster, **options: Any) -> Plan:
    chosen: dict[str, Any] = {
        "objective": Objective.THROUGHPUT,
        "num_microbatches": 8,
        "placement_seconds": 5.0,
    } | options
    return plan_graph(graph, cluster, batch_size=64, options=PlanOptions(**chosen))


def loads(plan: Plan) -> dict[int, float]:
    assert plan.prediction is not None
    return {load.device: load.total_seconds for load in plan.prediction.loads}


def device_of(plan: Plan) -> dict[int, int]:
    return {node: stage.device for stage in plan.stages for node in stage.nodes}


@pytest.mark.parametrize("objective", [Objective.THROUGHPUT, Objective.LATENCY])
@pytest.mark.parametrize("granularity", ["operator", "block"])
def test_a_plan_is_complete_and_its_text_parses_back(
    objective: Objective, granularity: str
) -> None:
    graph = wide()
    plan = place(graph, cpu_workers(FAST, SLOW), objective=objective, granularity=granularity)
    verify_plan(plan, graph)
    assert plan.objective is objective
    assert plan.certificate is not None and plan.prediction is not None
    assert 0 <= plan.certificate.gap <= 1
    assert parse_plan(print_plan(plan)) == plan
    assert set(device_of(plan)) == {node.id for node in graph.nodes}


def test_the_faster_device_gets_more_and_no_device_exceeds_the_certified_load() -> None:
    plan = place(wide(12), cpu_workers(FAST, SLOW))
    assert plan.certificate is not None
    assert max(loads(plan).values()) == pytest.approx(plan.certificate.objective)
    work = [list(device_of(plan).values()).count(device) for device in (0, 1)]
    assert work[0] > work[1] > 0
    alone = place(wide(12), cpu_workers(FAST))
    assert max(loads(plan).values()) < max(loads(alone).values())


def test_operators_go_where_they_are_supported() -> None:
    graph = wide()
    cluster = cpu_workers(replace(FAST, unsupported_ops=("aten.relu.default",)), SLOW)
    plan = place(graph, cluster)
    for node, device in device_of(plan).items():
        assert device == 1 or graph.nodes[node].op.name != "aten.relu.default"
    assert len(set(device_of(plan).values())) == 2
    assert len(plan.stages) > 2, "a device runs disconnected pieces"


def test_contiguous_plans_have_one_piece_a_device() -> None:
    plan = place(wide(12), cpu_workers(FAST, SLOW, SLOW), contiguous=True)
    assert len(plan.stages) == len({stage.device for stage in plan.stages})
    assert "contiguous" in plan.certificate.search_space  # type: ignore[union-attr]


def test_pins_are_kept() -> None:
    graph = wide()
    plan = place(graph, cpu_workers(FAST, SLOW), device_pins=(("layers.2", 1), ("layers.5", 0)))
    for node, device in device_of(plan).items():
        path = graph.nodes[node].module_path
        assert device == {"layers.2": 1, "layers.5": 0}.get(path, device)


def test_a_plan_fits_with_what_its_activations_need() -> None:
    graph = wide(8)
    free = place(graph, cpu_workers(FAST, SLOW))
    assert free.prediction is not None
    most = max(need.total_bytes for need in free.prediction.memory)
    limit = most - 40_000
    small = [replace(entry, memory_bytes=limit) for entry in (FAST, SLOW)]
    plan = place(graph, cpu_workers(*small))
    assert plan.prediction is not None
    assert all(need.total_bytes <= limit for need in plan.prediction.memory)
    assert max(loads(plan).values()) >= max(loads(free).values())
    assert plan.certificate is not None
    assert "bytes on each" in plan.certificate.search_space


def test_what_fits_nowhere_is_refused_with_figures() -> None:
    graph = wide(8)
    held = sum(value.type.num_bytes for value in graph.values_of(ValueKind.PARAMETER))
    small = [replace(entry, memory_bytes=held // 3) for entry in (FAST, SLOW)]
    with pytest.raises(InfeasibleError, match=str(held)):
        place(graph, cpu_workers(*small))
    tight = [replace(entry, memory_bytes=held // 2 + 5_000) for entry in (FAST, SLOW)]
    with pytest.raises(InfeasibleError, match="memory"):
        place(graph, cpu_workers(*tight))


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"granularity": "layer"}, "granularity = 'layer' is unknown"),
        ({"mesh": Mesh.parse("pipeline=2")}, "mesh is not for objective='throughput'"),
        ({"num_stages": 2}, "num_stages is not for"),
        ({"schedule": "1f1b"}, "schedule is not for"),
    ],
)
def test_options_that_contradict_placement_are_refused(options: dict[str, Any], cause: str) -> None:
    with pytest.raises(UsageError, match=cause):
        place(wide(2), cpu_workers(FAST, SLOW), **options)


def test_training_is_refused() -> None:
    with pytest.raises(UsageError, match="places operators for inference"):
        place(mlp(2), cpu_workers(FAST, SLOW))


def taken(plan: Plan) -> float:
    assert plan.prediction is not None
    return plan.prediction.step_seconds


def in_turn(graph: Graph, measured: Measured, num_devices: int = 2, run: int = 1) -> Plan:
    """Nodes on devices in turn, `run` of them at a time, by times that were measured."""
    cluster = cpu_workers(FAST, SLOW)
    options = PlanOptions(
        objective=Objective.THROUGHPUT, num_microbatches=8, measured=measured, placement_seconds=4.0
    )
    start = plan_graph(graph, cluster, batch_size=64, options=options)
    placement = [index // run % num_devices for index in range(len(graph.nodes))]
    return place_by_hand(start, Context(graph, options), placement, "a test")


def times(graph: Graph, **figures: float) -> Measured:
    """Every node takes a millisecond and messages nothing, unless `figures` of both say more."""
    row = (1e-3,) * len(graph.nodes)
    names = ("fast", "slow")
    return Measured(
        dict.fromkeys(names, row),
        {name: Link(figures.get("message", 0.0), float("inf")) for name in names},
        {name: figures.get("instruction", 0.0) for name in names},
        {name: figures.get("unsteady", 0.0) for name in names},
    )


def test_every_piece_and_message_costs_its_device() -> None:
    graph = wide()
    count = len(graph.nodes)
    plain = in_turn(graph, times(graph))
    assert len(plain.stages) == count
    messages = in_turn(graph, times(graph, message=1e-4))
    instructions = in_turn(graph, times(graph, instruction=1e-4))
    ends = [2 * pieces for pieces in (count // 2, count - count // 2)]
    ends[0] -= 1  # the first piece receives nothing,
    ends[(count - 1) % 2] -= 1  # and the last sends nothing
    for device, load in loads(plain).items():
        pieces = [stage for stage in plain.stages if stage.device == device]
        assert load == pytest.approx(1e-3 * len(pieces))
        sent = loads(messages)[device] - load
        assert sent == pytest.approx(1e-4 * ends[device])
        asked = loads(instructions)[device] - load
        assert asked == pytest.approx(sent + 1e-4 * len(pieces))
    assert taken(messages) > taken(plain)
    assert taken(instructions) > taken(messages)


def test_fewer_pieces_are_preferred_where_pieces_are_unsteady() -> None:
    graph = wide()
    half = (len(graph.nodes) + 1) // 2
    steady, unsteady = times(graph), times(graph, unsteady=1e-3)
    many, few = (in_turn(graph, steady, run=run) for run in (1, half))
    assert preferred((many, few)) is few, "they take about as long"
    slower = replace(few, prediction=replace(few.prediction, step_seconds=1.2 * taken(many)))  # type: ignore[type-var]
    assert preferred((many, slower)) is many
    many_now, few_now = (in_turn(graph, unsteady, run=run) for run in (1, half))
    assert taken(many_now) / taken(many) > taken(few_now) / taken(few)


def test_equal_numbers_of_operators_go_to_the_devices_in_the_best_order() -> None:
    graph = wide()
    row = tuple(1e-3 * (index + 1) for index in range(len(graph.nodes)))
    measured = replace(times(graph), nodes={"fast": row, "slow": tuple(3.0 * item for item in row)})
    options = PlanOptions(objective=Objective.THROUGHPUT, num_microbatches=8, measured=measured)
    start = in_turn(graph, measured)
    plan = equal_split(start, Context(graph, options))
    assert plan is not None
    verify_plan(plan, graph)
    half = len(graph.nodes) // 2
    assert [len(stage.nodes) for stage in plan.stages] in ([half, half], [half + 1, half])
    assert [stage.device for stage in plan.stages] == [1, 0], "the later nodes take longer"
    pinned = replace(options, device_pins=(("layers.0", 0), ("layers.1", 1)))
    assert equal_split(start, Context(graph, pinned)) is None
