"""Real processes over gloo train what one process trains: driver mode and torchrun."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest

from cutset.compiler.ir.mesh import Mesh
from tests.distributed.conftest import WorkerPool
from tests.exactness.harness import Subject, adamw64, sgd32
from tests.models.exact import EXACT_MODELS, SHARDED_MODELS
from tests.sharding.choices import zero_layouts_of

ROOT = Path(__file__).absolute().parents[2]


@pytest.mark.parametrize(
    ("name", "stages", "schedule"),
    [("gpt2", 2, "1f1b"), ("unet", 4, "1f1b"), ("t5", 3, "gpipe")],
)
def test_local_workers_are_exact(pool: WorkerPool, name: str, stages: int, schedule: str) -> None:
    errors = Subject(EXACT_MODELS[name], adamw64).errors(stages, schedule, pool.session(stages))
    assert all(error.value <= adamw64.tolerance for error in errors.values()), errors


def test_local_workers_are_exact_in_single_precision(pool: WorkerPool) -> None:
    subject = Subject(EXACT_MODELS["resnet"], sgd32, clip_grad_norm=0.5)
    errors = subject.errors(2, "1f1b", pool.session(2))
    assert all(error.value <= sgd32.tolerance for error in errors.values()), errors


@functools.cache
def gpt2() -> Subject:
    return Subject(SHARDED_MODELS["gpt2"], adamw64)


@pytest.mark.parametrize("mesh", ["tensor=2", "data=2,tensor=2", "data=2,pipeline=2"])
def test_local_workers_are_exact_over_meshes(pool: WorkerPool, mesh: str) -> None:
    axes = Mesh.parse(mesh)
    errors = gpt2().sharded_errors(axes, pool.session(axes.size))
    assert all(error.value <= adamw64.tolerance for error in errors.values()), errors


def test_local_workers_are_exact_over_unlike_meshes(pool: WorkerPool) -> None:
    errors = gpt2().mixed_errors("tensor=2/data=2", pool.session(4))
    assert all(error.value <= adamw64.tolerance for error in errors.values()), errors


@pytest.mark.parametrize("level", [1, 2, 3])
def test_local_workers_are_exact_under_zero(pool: WorkerPool, level: int) -> None:
    """gpt2's tied weight is on both stages, so it is scattered, then summed, then gathered."""
    axes = Mesh.parse("data=2")
    layouts = zero_layouts_of(gpt2().captured.graph, axes, level)
    errors = gpt2().errors(2, "1f1b", pool.session(4), axes, layouts)
    assert all(error.value <= adamw64.tolerance for error in errors.values()), errors


def test_torchrun_is_exact(tmp_path: Path) -> None:
    """Both ranks see the same errors against the unpartitioned model, and they are tiny."""
    script = ROOT / "tests" / "distributed" / "spmd_exact.py"
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            str(script),
            str(tmp_path),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert found[0] == found[1]
    assert set(found[0]) == {"loss", "outputs", "gradients", "weights"}
    assert all(value <= adamw64.tolerance for value in found[0].values()), found[0]
