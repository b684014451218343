"""Bad input ends with one clear error, soon, and leaves no process; here through the front door.

What a single part refuses is tested with it: plan files in tests/compiler/test_plan_json.py, ports
and sessions in test_launcher.py and test_spmd.py, Ctrl-C in a run in test_cli_end_to_end.py.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cutset.compiler.api import auto_partition, plan_model
from cutset.compiler.ir.errors import (
    CaptureError,
    ClusterError,
    CutsetError,
    InfeasibleError,
    PlanFormatError,
    RuntimeFailure,
    UsageError,
    VerificationError,
    WorkerLost,
)
from cutset.compiler.ir.mesh import Layout
from cutset.compiler.ir.plan import Plan, ValueLayout
from cutset.compiler.plan_json import plan_from_json, save_plan

from .processes import ROOT, descendants, start_script, wait_gone

LIMIT_SECONDS = 30


def net(width: int = 16) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(8, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(width, 8))


def partition(model: nn.Module, devices: Any = 2, **options: Any) -> Any:
    """Through the front door, with workers that start at once."""
    options.setdefault("example_inputs", (torch.randn(4, 8), torch.randn(4, 8)))
    options.setdefault("loss_fn", F.mse_loss)
    return auto_partition(model, devices, **options)


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """Every test ends in time and without a process that was not there before."""
    before = descendants(os.getpid())
    began = time.monotonic()
    yield
    assert time.monotonic() - began < LIMIT_SECONDS
    assert wait_gone(descendants(os.getpid()) - before, 1) == []


class DataDependent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if float(x.sum()) > 0 else x


class Broken(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise KeyError("no such weights")


@pytest.mark.parametrize(
    ("model", "words"), [(DataDependent(), "DataDependent"), (Broken(), "no such weights")]
)
def test_a_model_that_cannot_be_traced(
    model: nn.Module, words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(CaptureError, match=words) as caught:
        partition(model)
    assert caught.value.where
    assert caught.value.ways_out
    assert "Traceback" not in capfd.readouterr().err


def test_no_example_inputs() -> None:
    with pytest.raises(UsageError, match="no example inputs") as caught:
        partition(net(), example_inputs=None)
    assert any("example_inputs=" in way for way in caught.value.ways_out)
    with pytest.raises(UsageError, match="batch"):
        partition(net(), example_inputs=(), example_kwargs={"input": 3})


def test_training_state_three_times_one_device_is_refused_on_one_and_planned_on_four() -> None:
    model = nn.Sequential(*(nn.Linear(128, 128) for _ in range(16)))
    state_bytes = 4 * 4 * sum(parameter.numel() for parameter in model.parameters())
    limit = state_bytes // 3
    batch = torch.randn(4, 128), torch.randn(4, 128)
    with pytest.raises(InfeasibleError) as caught:
        partition(model, 1, example_inputs=batch, memory_limit_bytes=limit)
    assert "memory" in caught.value.cause
    assert re.search(r"\d[\d.]* [KMG]iB", caught.value.cause)
    assert caught.value.ways_out
    planned = plan_model(
        model, 4, example_inputs=batch, loss_fn=F.mse_loss, memory_limit_bytes=limit, num_stages=4
    )
    assert planned.plan.prediction is not None
    assert all(memory.total_bytes <= limit for memory in planned.plan.prediction.memory)


@pytest.mark.parametrize(
    "devices",
    ["warp-drive", "tpu:4", 0, -2, [torch.device("cuda", 97)], [], "no_such_file.toml", "cpu:x"],
)
def test_unknown_devices(devices: Any) -> None:
    with pytest.raises((ClusterError, UsageError)) as caught:
        partition(net(), devices)
    assert caught.value.cause
    assert caught.value.ways_out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mode": "dream"}, "dream"),
        ({"schedule": "zigzag"}, "zigzag"),
        ({"num_stages": 0}, "num_stages = 0"),
        ({"num_stages": 7}, "7"),
        ({"num_microbatches": 3}, "3"),
        ({"optimizer": "adam"}, "optimizer"),
        ({"optimizer": lambda parameters: None}, "optimizer"),
        ({"clip_grad_norm": -1.0}, "clip_grad_norm"),
        ({"constraints": {"no.such.module": 0}}, "no.such.module"),
        ({"constraints": {"0": 9}}, "10 stages"),
        ({"timeout_seconds": 0.0}, "timeout_seconds"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_wrong_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(CutsetError, match=re.escape(words)) as caught:
        partition(net(), **options)
    assert caught.value.ways_out


# -- plans -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plan_text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    batch = torch.randn(4, 8), torch.randn(4, 8)
    planned = plan_model(net(), 2, example_inputs=batch, loss_fn=F.mse_loss, num_stages=2)
    planned.plan.save(path)  # type: ignore[attr-defined]
    return path.read_text()


def _future(text: str) -> str:
    document = json.loads(text)
    document["format_version"] = 99
    return json.dumps(document)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: text[: len(text) // 2], "truncated"),
        (lambda text: text.replace('"batch_size": 4', '"batch_size": 8'), "edited"),
        (_future, "99"),
        (lambda text: "", "truncated"),
    ],
    ids=["truncated", "edited", "of the future", "empty"],
)
def test_plan_files_that_are_not_to_be_trusted(
    change: Callable[[str], str], words: str, plan_text: str, tmp_path: Path
) -> None:
    path = tmp_path / "plan.json"
    path.write_text(change(plan_text))
    assert path.read_text() != plan_text
    with pytest.raises(PlanFormatError, match=words) as caught:
        partition(net(), plan=path)
    assert str(path) in caught.value.where
    assert caught.value.ways_out


def test_a_plan_for_another_model_or_cluster(plan_text: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(plan_text)
    with pytest.raises(PlanFormatError, match="another|parameters"):
        partition(net(width=24), plan=path)
    with pytest.raises(PlanFormatError, match="2 devices"):
        partition(net(), 3, plan=path)
    with pytest.raises(PlanFormatError, match="'h100-node' has 8"):
        partition(net(), "h100-node", plan=path)
    with pytest.raises(PlanFormatError, match="infer"):
        partition(net(), plan=path, mode="infer")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda plan: replace(plan, recomputed=(0, 99)), "recomputed nodes .99. do not exist"),
        (
            lambda plan: replace(plan, layouts=(ValueLayout("ghost", Layout(())),)),
            "no value of this name",
        ),
    ],
)
def test_a_sound_plan_file_that_does_not_fit_the_graph(
    change: Callable[[Plan], Plan], words: str, plan_text: str, tmp_path: Path
) -> None:
    save_plan(change(plan_from_json(plan_text)), tmp_path / "plan.json")
    with pytest.raises(VerificationError, match=words):
        partition(net(), plan=tmp_path / "plan.json")


# -- processes ---------------------------------------------------------------------------------


def test_a_worker_killed_in_the_middle_of_training() -> None:
    with partition(net(), num_stages=2, timeout_seconds=20.0) as parallel:
        batch = torch.randn(4, 8), torch.randn(4, 8)
        parallel.train_step(*batch)
        victim = parallel._ranks.session.process_ids[1]
        threading.Timer(0.3, os.kill, (victim, signal.SIGKILL)).start()
        with pytest.raises(WorkerLost, match="the worker of rank 1 ended by SIGKILL"):
            for _ in range(100_000):
                parallel.train_step(*batch)
        with pytest.raises(RuntimeFailure, match="session that has ended"):
            parallel.train_step(*batch)


def test_an_error_inside_a_step_names_rank_and_cause() -> None:
    class Careful(nn.Sequential):
        pass

    model = Careful(nn.Embedding(5, 8), *net())
    ids, target = torch.tensor([[1], [2], [3], [4]]), torch.randn(4, 1, 8)
    with partition(model, example_inputs=(ids, target), num_stages=2) as parallel:
        parallel.train_step(ids, target)
        with pytest.raises(RuntimeFailure, match="index out of range") as caught:
            parallel.train_step(ids + 7, target)
        assert "rank 0" in caught.value.where


MODEL = """
import os, time, torch
from torch import nn
from cutset import auto_partition

class Slow(nn.Module):
    def forward(self, x):
        os.write(1, b"captured now\\n")
        time.sleep(60)
        return x

auto_partition(Slow(), 2, example_inputs=(torch.randn(4, 8),), mode="infer")
"""


def test_ctrl_c_while_planning_ends_the_workers_that_start_meanwhile(tmp_path: Path) -> None:
    with start_script(MODEL, tmp_path) as driver:
        assert driver.stdout is not None
        assert driver.stdout.readline() == "captured now\n"
        workers = descendants(driver.pid)
        assert workers
        os.killpg(driver.pid, signal.SIGINT)
        _, errors = driver.communicate(timeout=15)
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert wait_gone(workers, 0) == []


def test_port_in_use_under_torchrun(plan_text: str, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(plan_text)
    (tmp_path / "factory.py").write_text(
        "import torch\nfrom torch.nn.functional import mse_loss\n"
        "from tests.distributed.test_bad_input import net\n"
        "def make():\n    batch = torch.randn(4, 8), torch.randn(4, 8)\n"
        "    return {'model': net(), 'args': batch, 'loss_fn': mse_loss}\n"
    )
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        job = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, "-m", "cutset", "run", f"{tmp_path}/factory.py:make"]
        done = subprocess.run(
            [*command, "--plan", f"{tmp_path}/plan.json", "--timeout", "5"],
            cwd=ROOT,
            env={**os.environ, **job, "PYTHONPATH": str(ROOT)},
            check=False,
            capture_output=True,
            text=True,
            timeout=LIMIT_SECONDS,
        )
    assert done.returncode == 1, done.stderr
    assert f"cannot join the job at 127.0.0.1:{port}" in done.stderr
    assert "name a free MASTER_PORT" in done.stderr
    assert "Traceback" not in done.stderr


def test_help_of_the_worker() -> None:
    command = [sys.executable, "-m", "cutset.runtime.worker", "--help"]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage: python -m cutset.runtime.worker" in done.stdout
