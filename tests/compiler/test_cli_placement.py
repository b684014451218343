"""Operator placement from the command line: plan, explain, verify, simulate, export, run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest

from cutset.compiler.cli import main
from cutset.compiler.export import validate_onnx
from tests.compiler.trace_files import what_ranks_did

FACTORIES = """
import torch
from torch import nn
from torch.nn import functional as F

class Forked(nn.Module):
    def __init__(self, width=32):
        super().__init__()
        self.stem = nn.Linear(16, width)
        self.left = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))
        self.right = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
        self.head = nn.Linear(width, 4)

    def forward(self, x):
        x = self.stem(x)
        return self.head(self.left(x) * self.right(x))

def net():
    return {
        "model": Forked(),
        "args": (torch.randn(8, 16), torch.randint(0, 4, (8,))),
        "loss_fn": F.cross_entropy,
    }
"""

CLUSTER = """
name = "uneven"
local = true

[types.first]
backend = "cpu"
memory = "1 GiB"
memory_bandwidth = "10 GB/s"
rates = { f32 = "20 GFLOP/s" }
unsupported_ops = ["aten.tanh.default"]
threads = 1

[types.second]
backend = "cpu"
memory = "1 GiB"
memory_bandwidth = "5 GB/s"
rates = { f32 = "10 GFLOP/s" }
threads = 1

[[devices]]
type = "first"
node = "host"

[[devices]]
type = "second"
node = "host"

[[links]]
latency = "1 ns"
bandwidth = "100 GB/s"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("placement")
    (path / "factories.py").write_text(FACTORIES)
    (path / "cluster.toml").write_text(CLUSTER)
    return path


def plan_arguments(folder: Path, *more: str) -> list[str]:
    return [
        *("plan", f"{folder}/factories.py:net", "--devices", str(folder / "cluster.toml")),
        *("--mode", "infer", "--objective", "throughput", "--microbatches", "4"),
        *("--dtype", "float64", "--time-limit", "3", *more),
    ]


@pytest.fixture(scope="module")
def plan_file(folder: Path) -> Path:
    path = folder / "plan.json"
    assert main(plan_arguments(folder, "-o", str(path))) == 0
    return path


def _json(arguments: list[str], capsys: pytest.CaptureFixture[str], code: int = 0) -> Any:
    assert main([*arguments, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def model_of(folder: Path) -> list[str]:
    return ["--model", f"{folder}/factories.py:net", "--dtype", "float64"]


def test_explain_says_which_operators_lie_where_and_how_busy_devices_are(
    folder: Path, plan_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = _json(["explain", str(plan_file), *model_of(folder)], capsys)
    first, second = found["placement"]
    assert found["objective"] == "throughput"
    assert "tanh" not in first["operators"]
    assert second["operators"]["tanh"] == 1
    loads = [entry["load_seconds"] for entry in (first, second)]
    assert max(loads) == pytest.approx(found["certificate"]["objective"])
    assert sum(sum(entry["operators"].values()) for entry in (first, second)) == 9
    assert main(["explain", str(plan_file)]) == 0
    text = capsys.readouterr().out
    assert "objective throughput: the busiest device has least to do" in text
    assert "the busiest device is" in text


def test_other_verbs_take_a_placed_plan(
    folder: Path, plan_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    verified = _json(["verify", str(plan_file), *model_of(folder)], capsys)
    assert verified["ok"]
    alone = _json(["simulate", str(plan_file)], capsys)
    whole = _json(["simulate", str(plan_file), *model_of(folder)], capsys)
    assert 0 < alone["step_seconds"] <= whole["step_seconds"]
    target = tmp_path / "plan.onnx"
    _json(["export", str(plan_file), *model_of(folder), "--onnx", str(target)], capsys)
    validate_onnx(onnx.load(target))


def traced(
    folder: Path, plan: Path, into: Path, capsys: pytest.CaptureFixture[str]
) -> list[tuple[int, str, str]]:
    """What ranks did in a step that was run, which they do in a simulated one too."""
    events = []
    for verb in (["run", f"{folder}/factories.py:net", "--plan"], ["simulate"]):
        target = into / f"{verb[0]}.json"
        more = ["--steps", "2"] if verb[0] == "run" else ["--model", f"{folder}/factories.py:net"]
        found = _json(
            [*verb, str(plan), *more, "--dtype", "float64", "--trace", str(target)], capsys
        )
        assert found["step_seconds"] > 0
        events.append(what_ranks_did(json.loads(target.read_text())["traceEvents"]))
    assert events[0] == events[1]
    return events[0]


def test_traces_of_placed_operators_lie_side_by_side(
    folder: Path, plan_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = traced(folder, plan_file, tmp_path, capsys)
    names = {name for _, lane, name in found if lane == "compute"}
    assert {name.split(".")[1] for name in names} == {"0", "1", "2", "3"}  # microbatches
    assert any(lane == "communication" for _, lane, _ in found)


@pytest.mark.parametrize(
    ("options", "least_pieces"),
    [
        (["--objective", "latency", "--devices", "{folder}/cluster.toml"], 3),
        (["--mesh", "pipeline=2", "--microbatches", "4", "--devices", "2"], 2),
        (["--mesh", "data=2", "--devices", "2"], 1),
    ],
)
def test_traces_of_inference_lie_side_by_side(
    options: list[str],
    least_pieces: int,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plan = tmp_path / "plan.json"
    wanted = [option.format(folder=folder) for option in options]
    arguments = ["plan", f"{folder}/factories.py:net", "--mode", "infer", "--dtype", "float64"]
    _json([*arguments, *wanted, "-o", str(plan)], capsys)
    found = traced(folder, plan, tmp_path, capsys)
    pieces = {name.split(".")[0] for _, lane, name in found if lane == "compute"}
    assert len(pieces) >= least_pieces
    assert {rank for rank, _, _ in found} == {0, 1}


def test_run_infers_what_the_model_infers_and_tells_how_busy_devices_were(
    folder: Path, plan_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["run", f"{folder}/factories.py:net", "--plan", str(plan_file), "--compare"]
    found = _json([*arguments, "--steps", "2", "--dtype", "float64"], capsys)
    assert found["max_relative_error"]["outputs"] <= 1e-12
    assert len(found["busy_seconds"]) == len(found["predicted_busy_seconds"]) == 2
    assert min(found["busy_seconds"]) > 0
    assert found["step_seconds"] > 0 and found["predicted_step_seconds"] > 0
    refused = _json([*arguments, "--clip-grad-norm", "1.0"], capsys, code=2)
    assert "--clip-grad-norm is for training" in refused["error"]["cause"]


@pytest.mark.parametrize("limit", ["1e-6", "2e-5"])
def test_what_cannot_be_placed_is_one_error_and_exit_code_1(
    folder: Path, capsys: pytest.CaptureFixture[str], limit: str
) -> None:
    found = _json(plan_arguments(folder, "--memory-limit", limit), capsys, code=1)
    assert found["error"]["kind"] == "InfeasibleError"
    assert "bytes" in found["error"]["cause"]


def test_an_operator_that_no_device_supports_is_named(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nowhere = tmp_path / "nowhere.toml"
    lacking = '[types.second]\nunsupported_ops = ["aten.tanh.default"]'
    nowhere.write_text(CLUSTER.replace("[types.second]", lacking))
    arguments = plan_arguments(folder)
    arguments[arguments.index("--devices") + 1] = str(nowhere)
    found = _json(arguments, capsys, code=1)
    assert "no device can run aten.tanh.default of left.1" in found["error"]["cause"]


def test_training_cannot_be_placed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = plan_arguments(folder)
    arguments[arguments.index("infer")] = "train"
    found = _json(arguments, capsys, code=2)
    assert "places operators for inference" in found["error"]["cause"]
