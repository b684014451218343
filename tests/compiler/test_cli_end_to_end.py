"""The verbs on a real model, one after the other: plan, explain, verify, simulate, export, run."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import nn

from cutset.compiler.cli import main
from cutset.compiler.export import validate_onnx
from cutset.compiler.plan_json import load_plan, save_plan
from tests.compiler.trace_files import what_ranks_did

FACTORIES = """
import torch
from torch import nn
from torch.nn import functional as F

def net(width=32):
    layers = [nn.Linear(16, width), nn.Tanh(), nn.Dropout(0.1), nn.Linear(width, width), nn.Tanh()]
    print("a factory may print")
    return {
        "model": nn.Sequential(*layers, nn.Linear(width, 4)),
        "args": (torch.randn(8, 16), torch.randint(0, 4, (8,))),
        "loss_fn": F.cross_entropy,
    }

def other():
    return net(width=48)

def empty():
    made = net()
    made["model"].to("meta")
    return made
def wide():
    with torch.device("meta"):
        layers = [nn.Linear(2048, 8192), nn.ReLU(), nn.Linear(8192, 2048)]
        return {
            "model": nn.Sequential(*layers),
            "args": (torch.randn(16384, 2048), torch.randn(16384, 2048)),
            "loss_fn": F.mse_loss,
        }

def meta():
    with torch.device("meta"):
        return net()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli")
    (path / "factories.py").write_text(FACTORIES)
    return path


@pytest.fixture(scope="module")
def plan_file(folder: Path) -> Path:
    path = folder / "plan.json"
    arguments = ["plan", f"{folder}/factories.py:net", "--devices", "2", "--stages", "2"]
    assert main([*arguments, "--microbatches", "4", "--dtype", "float64", "-o", str(path)]) == 0
    return path


def _json(arguments: list[str], capsys: pytest.CaptureFixture[str], code: int = 0) -> Any:
    assert main([*arguments, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_plan_prints_what_it_decided(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", f"{folder}/factories.py:net", "--devices", "2", "--mode", "infer"]
    found = _json([*arguments, "--microbatches", "2"], capsys)
    assert found["mode"] == "infer"
    assert found["num_microbatches"] == 2
    assert found["certificate"]["gap"] >= 0


def test_plan_takes_a_mesh_and_a_level_of_zero(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["plan", f"{folder}/factories.py:wide", "--devices", "h100:4", "--zero", "2"]
    found = _json([*arguments, "--mesh", "data=2,tensor=2", "--microbatches", "1"], capsys)
    assert (found["mesh"], found["zero"]) == ("data=2,tensor=2", 2)
    assert found["layouts"]["axes"] == ["data", "tensor"]
    assert found["layouts"]["sharded_nodes"] > 0
    assert {entry["count"] for entry in found["layouts"]["parameters"]} != set()
    refused = _json([*arguments, "--mesh", "tensor=4"], capsys, code=2)
    assert "mesh tensor=4 has none" in refused["error"]["cause"]


def test_plan_takes_a_mesh_for_each_stage(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", f"{folder}/factories.py:wide", "--devices", "h100:3"]
    found = _json([*arguments, "--mesh", "data=2/data=1"], capsys)
    assert found["mesh"] == "data=2/data=1"
    assert [stage["axes"] for stage in found["devices"]["stages"]] == [{"data": 2}, {}]
    refused = _json([*arguments, "--mesh", "data=2/tensor=2"], capsys, code=2)
    assert "needs 4 devices, the cluster has 3" in refused["error"]["cause"]


def test_explain_knows_modules_when_it_has_the_model(
    folder: Path, plan_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = _json(["explain", str(plan_file)], capsys)
    assert [stage["modules"] for stage in alone["stages"]] == [[], []]
    model = ["--model", f"{folder}/factories.py:net", "--dtype", "float64"]
    found = _json(["explain", str(plan_file), *model], capsys)
    modules = [name for stage in found["stages"] for name in stage["modules"]]
    assert any(name.startswith("0") for name in modules)
    assert main(["explain", str(plan_file)]) == 0
    assert "schedule 1f1b" in capsys.readouterr().out


def test_verify_with_the_model_compares_numbers(
    folder: Path, plan_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _json(["verify", str(plan_file)], capsys)["checks"] == ["plan file", "plan"]
    model = ["--model", f"{folder}/factories.py:net", "--dtype", "float64"]
    found = _json(["verify", str(plan_file), *model], capsys)
    assert found["ok"]
    assert found["checks"][-1] == "numbers"


def test_a_plan_for_another_model_is_refused(
    folder: Path, plan_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["verify", str(plan_file), "--model", f"{folder}/factories.py:other"]
    found = _json(arguments, capsys, code=2)
    assert found["error"]["kind"] == "PlanFormatError"


def test_an_edited_plan_is_refused(
    folder: Path, plan_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut = folder / "cut.json"
    cut.write_text(plan_file.read_text()[:-40])
    assert main(["verify", str(cut)]) == 2
    assert str(cut) in capsys.readouterr().err
    assert main(["explain", str(folder / "absent.json")]) == 2


def test_a_memory_limit_that_cannot_hold_exits_with_1(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["plan", f"{folder}/factories.py:net", "--devices", "2", "--memory-limit", "1e-6"]
    found = _json(arguments, capsys, code=1)
    assert found["error"]["kind"] == "InfeasibleError"


def test_simulate_counts_communication_with_the_model(
    folder: Path, plan_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = _json(["simulate", str(plan_file)], capsys)
    model = ["--model", f"{folder}/factories.py:net", "--dtype", "float64"]
    whole = _json(["simulate", str(plan_file), *model], capsys)
    assert not alone["counts_communication"]
    assert whole["counts_communication"]
    assert whole["step_seconds"] > alone["step_seconds"] > 0
    assert {(link["source"], link["target"]) for link in whole["link_bytes"]} == {(0, 1), (1, 0)}
    assert len(whole["peak_memory_bytes"]) == 2


def test_simulate_wants_times_of_all_actions_or_the_model(
    plan_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = load_plan(plan_file)
    assert plan.prediction is not None
    untimed = replace(plan.prediction, stage_backward_seconds=())
    save_plan(replace(plan, prediction=untimed), tmp_path / "plan.json")
    assert main(["simulate", str(tmp_path / "plan.json")]) == 2
    assert "no predicted stage times" in capsys.readouterr().err


def test_export_writes_onnx_that_passes_the_validator(
    folder: Path, plan_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = folder / "plan.onnx"
    model = ["--model", f"{folder}/factories.py:net", "--dtype", "float64"]
    found = _json(["export", str(plan_file), *model, "--onnx", str(target), "--weights"], capsys)
    exported = onnx.load(target)
    validate_onnx(exported)
    assert found["num_nodes"] == len(exported.graph.node)
    assert len(exported.graph.initializer) == 6


def test_run_trains_the_same_weights_as_the_unpartitioned_model(
    folder: Path, plan_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["run", f"{folder}/factories.py:net", "--plan", str(plan_file), "--compare"]
    trace = ["--trace", str(folder / "measured.json")]
    found = _json([*arguments, "--steps", "3", "--dtype", "float64", "--seed", "7", *trace], capsys)
    assert set(found["max_relative_error"]) == {"loss", "outputs", "gradients", "weights"}
    assert max(found["max_relative_error"].values()) < 1e-10
    assert len(found["losses"]) == 3
    assert len(found["peak_memory_bytes"]) == 2
    assert all(peak > 0 for peak in found["peak_memory_bytes"])
    assert found["step_seconds"] > 0
    assert found["reference_step_seconds"] > 0
    assert found["predicted_step_seconds"] > 0
    model = ["--model", f"{folder}/factories.py:net", "--dtype", "float64"]
    trace = ["--trace", str(folder / "simulated.json")]
    assert main(["simulate", str(plan_file), *model, *trace]) == 0
    measured, simulated = (
        json.loads((folder / f"{name}.json").read_text())["traceEvents"]
        for name in ("measured", "simulated")
    )
    assert what_ranks_did(measured) == what_ranks_did(simulated)
    assert sum(entry["name"] == "I 1.0" for entry in measured) == 1
    assert all(entry["dur"] >= 0 for entry in measured if entry["ph"] == "X")
    levels = [entry["args"]["bytes"] for entry in simulated if entry["ph"] == "C"]
    assert max(levels) > min(levels) > 0


def test_run_goes_on_from_a_checkpoint(
    folder: Path, plan_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three steps from weights in a file are one, saved, and two more of a model on meta."""
    torch.manual_seed(9)
    net = nn.Sequential(
        *(nn.Linear(16, 32), nn.Tanh(), nn.Dropout(0.1), nn.Linear(32, 32), nn.Tanh()),
        nn.Linear(32, 4),
    )
    torch.save(net.state_dict(), tmp_path / "weights.pt")
    common = ["--plan", str(plan_file), "--dtype", "float64", "--seed", "7"]
    given = ["--weights", str(tmp_path / "weights.pt")]
    real = ["run", f"{folder}/factories.py:net", *common, *given]
    whole = _json([*real, "--steps", "3", "--compare"], capsys)
    assert max(whole["max_relative_error"].values()) < 1e-10
    saved = ["--save-checkpoint", str(tmp_path / "c")]
    first = _json([*real, "--steps", "1", *saved], capsys)
    empty = ["run", f"{folder}/factories.py:empty", *common]
    load = ["--load-checkpoint", str(tmp_path / "c")]
    rest = _json([*empty, "--steps", "2", *load], capsys)
    assert first["losses"] + rest["losses"] == whole["losses"]
    for wrong in ([*empty, "--compare", *given], [*real, "--compare", *load], [*real, *saved]):
        assert main(wrong) == 2


def test_run_under_torchrun_prints_once(folder: Path, plan_file: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "-m", "cutset", "run"]
    command += [f"{folder}/factories.py:net", "--plan", str(plan_file), "--compare", "--json"]
    command += ["--steps", "2", "--dtype", "float64"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert max(json.loads(done.stdout)["max_relative_error"].values()) < 1e-10


def test_ctrl_c_ends_the_run_and_its_workers(folder: Path, plan_file: Path) -> None:
    command = [sys.executable, "-m", "cutset", "run", f"{folder}/factories.py:net"]
    command += ["--plan", str(plan_file), "--dtype", "float64", "--steps", "1000000"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if "step 3" in line:
                break
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the workers get it too
        _, errors = process.communicate(timeout=30)
        assert process.returncode == 130
        assert errors.rstrip().endswith("cutset: interrupted")
        assert "Traceback" not in errors
        _wait_for_end_of_group(process.pid)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _wait_for_end_of_group(group: int) -> None:
    """Fail unless no process of the group is left after a few seconds."""
    limit = time.monotonic() + 10
    while time.monotonic() < limit:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail("processes are left after Ctrl-C")


def test_a_meta_model_is_planned_but_not_run(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / "meta.json"
    model = f"{folder}/factories.py:meta"
    assert main(["plan", model, "--devices", "2", "-o", str(path)]) == 0
    assert main(["run", model, "--plan", str(path)]) == 2
    captured = capsys.readouterr()
    assert "planned, not run" in captured.err
