"""Placement of operators as a pass: complete plans, memory, what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from cutset.compiler.ir.cluster import Cluster
from cutset.compiler.ir.errors import InfeasibleError, UsageError
from cutset.compiler.ir.graph import Graph, Mode, ValueKind
from cutset.compiler.ir.mesh import Mesh
from cutset.compiler.ir.plan import Objective, Plan
from cutset.compiler.ir.text import parse_plan, print_plan
from cutset.compiler.ir.verify import verify_plan
from cutset.passes.pipeline import PlanOptions, plan_graph
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
