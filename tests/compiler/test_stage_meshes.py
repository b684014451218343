"""Meshes of stages that the user asks for: planned, run, explained, refused where they conflict."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cutset.compiler.api import plan_model
from cutset.compiler.explain import explain, explain_json
from cutset.compiler.ir.cluster import Cluster, Device, DeviceType, Link, LinkRule
from cutset.compiler.ir.errors import InfeasibleError, UsageError
from cutset.compiler.ir.mesh import Mesh
from cutset.compiler.parallel import Parallel, RunOptions
from cutset.compiler.plan_json import load_plan, save_plan
from cutset.compiler.planned import PlannedModel
from cutset.compiler.validate import verify_numerically
from cutset.cost_models import simulate
from cutset.runtime.inprocess import InProcessSession
from tests.compiler.partitioned import Plain, assert_same

WIDTH, ROWS = 64, 16


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.dropout(self.down(F.gelu(self.up(self.norm(x)))), 0.1, self.training)


def tower(depth: int = 6) -> nn.Module:
    """The same weights on every call."""
    torch.manual_seed(2)
    return nn.Sequential(*(Block() for _ in range(depth))).double().train()


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(ROWS, WIDTH, generator=source, dtype=torch.float64) for _ in range(2))
    return x, y


def planned(mesh: str, devices: int, **options: Any) -> PlannedModel:
    return plan_model(
        tower(),
        devices,
        example_inputs=batch(),
        loss_fn=F.mse_loss,
        mesh=mesh,
        check=False,
        **options,
    )


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2)


@pytest.mark.parametrize(
    ("mesh", "devices"), [("data=2/data=1", 3), ("data=2,tensor=2/tensor=2", 6)]
)
def test_planned_meshes_train_what_one_process_trains(mesh: str, devices: int) -> None:
    found = planned(mesh, devices)
    assert found.plan.mesh_text == mesh
    options = RunOptions(loss_fn=F.mse_loss, optimizer=adamw)
    parallel = Parallel(found, options, InProcessSession(devices))
    plain = Plain(tower(), adamw, rows=ROWS // found.plan.num_microbatches)
    for seed in range(3):
        inputs = batch(seed)
        assert abs(float(parallel.train_step(*inputs)) - plain.step(*inputs)) <= 1e-11
    assert_same(parallel.state_dict(), plain.model.state_dict(), 1e-10)


def test_a_plan_is_priced_explained_saved_and_validated(tmp_path: Path) -> None:
    found = planned("data=2/data=1", 3)
    plan = found.plan
    assert plan.prediction is not None and plan.certificate is not None
    simulation = simulate(found.programs, cluster=plan.cluster, optimizer=plan.optimizer)
    assert simulation.step_seconds == plan.prediction.step_seconds
    peaks = simulation.peak_memory_bytes
    bounds = {entry.device: entry.total_bytes for entry in plan.prediction.memory}
    assert all(peaks[device] <= bounds[device] for device in range(3))
    assert "stages on the meshes data=2/data=1" in plan.certificate.search_space
    text = explain(plan, found.captured.graph, found.programs)
    assert "stage 0   | data=2 on 0-1" in text and "stage 1   | one device on 2" in text
    data = explain_json(plan, found.captured.graph, found.programs)
    assert data["mesh"] == "data=2/data=1"
    save_plan(plan, tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == plan
    assert all(error < 1e-9 for error in verify_numerically(found).values())


def fast_and_slow(fast: int, slow: int, share: float) -> Cluster:
    """Devices of two speeds on one node."""
    kinds = tuple(
        DeviceType(name, "cpu", 1 << 30, 1e12, (("f64", rate),), 1e-7)
        for name, rate in (("fast", 2e9), ("slow", 2e9 * share))
    )
    names = ("fast",) * fast + ("slow",) * slow
    devices = tuple(Device(index, name, "node") for index, name in enumerate(names))
    return Cluster("two speeds", kinds, devices, (LinkRule(Link(1e-6, 1e10)),))


def test_meshes_of_stages_are_searched_where_devices_differ() -> None:
    """A slow pair works as fast as the fast device: found, explained and trained."""
    arguments: dict[str, Any] = {"example_inputs": batch(), "loss_fn": F.mse_loss, "check": False}
    machine = fast_and_slow(1, 2, 0.6)
    found = plan_model(tower(), machine, **arguments)
    plan = found.plan
    assert plan.mesh_text == "data=1/tensor=2"
    asked = plan_model(tower(), machine, mesh=plan.mesh_text, **arguments).plan
    assert plan.objective_seconds <= asked.objective_seconds
    first = plan.alternatives[0]
    uniform = plan_model(tower(), machine, mesh=first.mesh, **arguments).plan
    assert uniform.objective_seconds > 1.02 * plan.objective_seconds
    assert first.step_seconds == pytest.approx(uniform.objective_seconds, rel=0.01)
    text = explain(plan, found.captured.graph, found.programs)
    assert "meshes data=1/tensor=2 (each stage has its own)" in text
    assert re.search(r"runner-up +mesh .*, the best with one mesh for all stages", text)
    options = RunOptions(loss_fn=F.mse_loss, optimizer=adamw)
    parallel = Parallel(found, options, InProcessSession(3))
    plain = Plain(tower(), adamw, rows=ROWS // plan.num_microbatches)
    for seed in range(2):
        assert abs(float(parallel.train_step(*batch(seed))) - plain.step(*batch(seed))) <= 1e-11
    assert_same(parallel.state_dict(), plain.model.state_dict(), 1e-10)


def test_meshes_that_are_alike_are_one_mesh() -> None:
    plan = planned("data=2/data=2", 4).plan
    assert not plan.is_mixed and plan.mesh == Mesh.parse("pipeline=2,data=2")


def test_devices_of_a_stage_that_are_faster_get_more_of_the_model() -> None:
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(2048, 2048) for _ in range(16)))
        inputs = torch.randn(8192, 2048), torch.randn(8192, 2048)
    shares = []
    for mesh in ("data=4/data=1", "data=1/data=4"):
        found = plan_model(model, "h100:5", example_inputs=inputs, loss_fn=F.mse_loss, mesh=mesh)
        first, second = (len(stage.nodes) for stage in found.plan.stages)
        shares.append(first / (first + second))
    assert shares[0] > 0.65 and shares[1] < 0.35


def test_zero_is_taken_where_nothing_fits_without() -> None:
    mesh = "data=2,tensor=2/data=2"
    free = planned(mesh, 6, num_microbatches=2).plan
    assert free.prediction is not None and free.zero_level == 0
    most = max(entry.total_bytes for entry in free.prediction.memory)
    lean = planned(mesh, 6, num_microbatches=2, memory_limit_bytes=int(0.8 * most)).plan
    assert lean.zero_level > 0
    with pytest.raises(InfeasibleError, match="does not fit into"):
        planned(mesh, 6, num_microbatches=2, memory_limit_bytes=most // 8)


@pytest.mark.parametrize(
    ("mesh", "options", "cause"),
    [
        ("data=2/data=2,tensor=2", {}, "needs 6 devices, the cluster has 4"),
        ("data=2/data=1", {"num_stages": 3}, "num_stages = 3 contradicts mesh data=2/data=1"),
        ("pipeline=2/data=1", {}, "has a pipeline axis inside a stage"),
        ("rows=2/data=1", {}, "unknown mesh axis 'rows'"),
        ("data=2//data=1", {}, "not a mesh of a stage"),
        ("tensor=2/data=1", {"zero": 2}, "has none"),
        ("data=2/data=1", {"constraints": {"0": 0}}, "modules are pinned"),
        ("data=2/data=1", {"offload": "optimizer"}, "are to be offloaded"),
        ("data=2/data=1", {"profile": "blocks"}, "measures blocks over one mesh"),
        ("data=2/data=1", {"num_microbatches": 5}, "does not divide"),
    ],
)
def test_conflicts_are_named(mesh: str, options: dict[str, Any], cause: str) -> None:
    with pytest.raises(UsageError) as caught:
        planned(mesh, 4, **options)
    assert cause in caught.value.cause and caught.value.ways_out


class Tied(nn.Module):
    """An embedding whose weight is the head's."""

    def __init__(self, size: int = 4096) -> None:
        super().__init__()
        self.table = nn.Embedding(size, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(3)))

    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(self.blocks(self.table(ids)), self.table.weight)


@pytest.mark.parametrize("mesh", ["data=2/data=1", "tensor=2/data=1"])
def test_tied_parameters_are_whole_in_all_their_stages(mesh: str) -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, 4096, (ROWS,))
    found = plan_model(
        Tied(), 3, example_inputs=(ids, ids), loss_fn=F.cross_entropy, mesh=mesh, check=False
    )
    for program in found.programs:
        assert dict(program.gradient_terms)["table.weight"] == (0, 1, 2)
        assert all(shard.name != "table.weight" for shard in program.shards)
    assert all(error < 1e-9 for error in verify_numerically(found).values())


def test_a_large_vocabulary_that_stages_share_is_not_split() -> None:
    """Alone on the mesh, the table would be held in parts."""
    with torch.device("meta"):
        model, ids = Tied(1 << 17), torch.zeros(4096, dtype=torch.long)
    arguments: dict[str, Any] = {"example_inputs": (ids, ids), "loss_fn": F.cross_entropy}
    alone = plan_model(model, "h100:2", mesh="tensor=2", **arguments)
    assert any(shard.name == "table.weight" for shard in alone.programs[0].shards)
    shared = plan_model(model, "h100:3", mesh="data=1/tensor=2", **arguments)
    assert all("table.weight" in dict(program.gradient_terms) for program in shared.programs)
    assert all(shard.name != "table.weight" for p in shared.programs for shard in p.shards)


def test_recomputation_is_kept_stage_by_stage() -> None:
    found = planned("data=2/data=1", 3, recompute="full")
    assert found.plan.recomputed
    assert all(program.stages[0].recomputed for program in found.programs)
