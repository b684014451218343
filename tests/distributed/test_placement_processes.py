"""Operators placed one by one, over real gloo workers that differ."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cutset.compiler import profile
from cutset.compiler.api import auto_partition
from cutset.compiler.ir.graph import Graph, Mode
from cutset.compiler.ir.ops import Category
from cutset.compiler.ir.plan import Plan
from cutset.compiler.measure import measure_inference
from cutset.compiler.plan_json import load_plan
from cutset.compiler.planning import Planning
from cutset.compiler.profile import NodeTimes
from cutset.compiler.profile_database import ProfileDatabase
from cutset.compiler.reference import flatten_outputs, infer_reference, relative_error
from tests.exactness.placed import cpu_type, cpu_workers, placed_by, scattered
from tests.models.nets import Inception

from .conftest import WorkerPool

ROUNDING = 1e-12
ATTENTION = "aten.scaled_dot_product_attention.default"
EMBEDDING = "aten.embedding.default"


class Reader(nn.Module):
    """Embeddings, two layers with attention, scores."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(50, width), nn.Embedding(16, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 64, batch_first=True, norm_first=True)
            for _ in range(2)
        )
        self.head = nn.Linear(width, 50)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.words(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(hidden)


def device_of(plan: Plan, graph: Graph) -> dict[str, set[int]]:
    """Devices on which operators of each name run."""
    found: dict[str, set[int]] = {}
    for stage in plan.stages:
        for node in stage.nodes:
            found.setdefault(graph.nodes[node].op.name, set()).add(stage.device)
    return found


def error_of(parallel: Any, model: nn.Module, args: tuple[Tensor, ...]) -> float:
    ours = flatten_outputs(parallel(*args))
    count = parallel.plan.num_microbatches
    return relative_error(ours, infer_reference(model, (args, {}), count)).value


def images(rows: int = 8) -> tuple[Tensor, ...]:
    return (torch.randn(rows, 3, 16, 16, dtype=torch.float64),)


def test_scattered_branches_run_exactly_and_fit_as_predicted(pool: WorkerPool) -> None:
    torch.manual_seed(0)
    model, args = Inception().double().eval(), images()
    cluster = cpu_workers(*(cpu_type("worker"),) * 3)
    plan, _ = placed_by(scattered(2), model, args, {}, cluster, 4)
    with auto_partition(
        model, cluster, example_inputs=args, mode="infer", plan=plan, session=pool.session(3)
    ) as parallel:
        assert error_of(parallel, model, args) <= ROUNDING
        measured = measure_inference(parallel, args, steps=2)
        assert error_of(parallel, model, images(4)) <= ROUNDING, "another batch size"
    assert plan.prediction is not None
    assert len(measured.busy_seconds) == 3 and min(measured.busy_seconds) > 0
    for need, peak in zip(plan.prediction.memory, measured.peak_memory_bytes, strict=True):
        assert 0 < peak <= need.total_bytes


def test_attention_on_one_type_and_embeddings_on_another(pool: WorkerPool, tmp_path: Any) -> None:
    torch.manual_seed(1)
    model = Reader().double().eval()
    args = (torch.randint(50, (8, 12)),)
    host = cpu_type("host", 1e10, unsupported_ops=(ATTENTION,))
    accelerator = cpu_type("accelerator", 4e10, unsupported_ops=(EMBEDDING,))
    with auto_partition(
        model,
        cpu_workers(host, accelerator),
        example_inputs=args,
        mode="infer",
        objective="throughput",
        num_microbatches=4,
        placement_seconds=4.0,
        session=pool.session(2),
    ) as parallel:
        assert error_of(parallel, model, args) <= ROUNDING
        graph = parallel.planned.captured.graph
        homes = device_of(parallel.plan, graph)
        told = parallel.explain()
        path = tmp_path / "plan.json"
        parallel.plan.save(path)  # type: ignore[attr-defined]
        assert load_plan(path) == parallel.plan
    assert any(node.op.category is Category.ATTENTION for node in graph.nodes)
    assert homes[ATTENTION] == {1}
    assert homes[EMBEDDING] == {0}
    assert "device 0 (host on host)" in told
    assert "device 1 (accelerator on host) busiest" in told
    assert "2 scaled_dot_product_attention" in told
    assert "the busiest device is 1" in told


def test_a_worker_without_room_gets_less(pool: WorkerPool) -> None:
    torch.manual_seed(2)
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(8))).double().eval()
    args = (torch.randn(8, 64, dtype=torch.float64),)
    small = cpu_type("small", 4e10, memory_bytes=150_000)
    with auto_partition(
        model,
        cpu_workers(small, cpu_type("large")),
        example_inputs=args,
        mode="infer",
        objective="throughput",
        num_microbatches=4,
        placement_seconds=4.0,
        session=pool.session(2),
    ) as parallel:
        assert error_of(parallel, model, args) <= ROUNDING
        measured = measure_inference(parallel, args)
        assert parallel.plan.prediction is not None
        needs = {need.device: need.total_bytes for need in parallel.plan.prediction.memory}
        assert measured.peak_memory_bytes[0] <= needs[0] <= 150_000


@pytest.mark.parametrize(
    "objective", ["throughput", pytest.param("latency", marks=pytest.mark.slow)]
)
def test_workers_start_with_the_threads_of_their_type_and_are_measured(
    objective: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUTSET_CACHE", str(tmp_path))
    torch.manual_seed(0)
    model, args = Inception().double().eval(), images()
    two = replace(cpu_type("two-threads"), threads=2)
    cluster = cpu_workers(two, cpu_type("one-thread"))
    with auto_partition(
        model,
        cluster,
        example_inputs=args,
        mode="infer",
        objective=objective,
        profile="ops",
        placement_seconds=4.0,
        timeout_seconds=60.0,
        constraints={"stem": 0, "head": 1},
    ) as parallel:
        assert error_of(parallel, model, args) <= ROUNDING
        plan = parallel.plan
    assert plan.prediction is not None
    loads = plan.prediction.loads
    assert all(load.compute_seconds > 0 for load in loads)
    assert {stage.device for stage in plan.stages} == {0, 1}
    records = ProfileDatabase(tmp_path).records()
    threads = {record.key.device.partition(";")[0].split(", ")[-1] for record in records}
    assert threads == {"1 threads", "2 threads"}
    planning = Planning(model, (args, {}), cluster, Mode.INFER, None, False, lambda line: None)
    captured = planning.captured(plan.num_microbatches)
    plans = [plan] if objective == "latency" else [plan, _elsewhere(plan)]
    times = NodeTimes(captured, cluster, ProfileDatabase(tmp_path), planning.say)
    try:
        found = times.in_place(plans)
    finally:
        times.close()
    for own, measured in zip(plans, found, strict=True):
        for stage in own.stages:
            seconds = measured.nodes[cluster.type_of(stage.device).name]
            assert all(seconds[node] > 0.0 for node in stage.nodes)
    assert set(found[0].unsteady) == {"two-threads", "one-thread"}
    assert all(1e-7 < seconds < 1e-2 for seconds in found[0].instructions.values())

    def starts_no_worker(*arguments: object, **options: object) -> None:
        raise AssertionError("everything is known")

    monkeypatch.setattr(profile, "profiling_session", starts_no_worker)
    times = NodeTimes(captured, cluster, ProfileDatabase(tmp_path), planning.say)
    assert times.in_place(plans[::-1]) == found[::-1], "kept, whichever has its turn first"


def _elsewhere(plan: Plan) -> Plan:
    """With devices exchanged."""
    stages = tuple(replace(s, devices=(1 - s.device,)) for s in plan.stages)
    return replace(plan, stages=stages)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("profile", ["off", "ops"])
def test_embeddings_on_the_cpu_beside_a_gpu(profile: str) -> None:
    torch.manual_seed(1)
    model = Reader().double().eval()
    args = (torch.randint(50, (8, 12)),)
    with auto_partition(
        model,
        [torch.device("cuda", 0), torch.device("cpu")],
        example_inputs=args,
        mode="infer",
        objective="throughput",
        profile=profile,
        num_microbatches=4,
        placement_seconds=4.0,
        timeout_seconds=120.0,
        constraints={"words": 1, "places": 1, "layers.0": 0, "layers.1": 0, "head": 1},
    ) as parallel:
        assert error_of(parallel, model, args) <= 1e-10
        measured = measure_inference(parallel, args, steps=2)
    assert {stage.device for stage in parallel.plan.stages} == {0, 1}
    assert min(measured.busy_seconds) > 0
