"""Plan, measure and plan again on two workers; then train, as exactly as ever."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from cutset import auto_partition
from cutset.compiler.cli import main

FACTORY = """
import torch
from torch import nn

def build():
    layers = [nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64)) for _ in range(3)]
    x, y = torch.randn(8, 64), torch.randn(8, 64)
    return {"model": nn.Sequential(*layers), "args": (x, y), "loss_fn": nn.functional.mse_loss}
"""


def net() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)) for _ in range(4)]
    return nn.Sequential(*layers).double()


@pytest.mark.parametrize("kind", ["blocks", "ops"])
def test_a_measured_plan_trains_exactly(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUTSET_CACHE", str(tmp_path))
    torch.manual_seed(1)
    x, y = torch.randn(8, 64, dtype=torch.float64), torch.randn(8, 64, dtype=torch.float64)
    lines: list[str] = []
    model = net()
    with auto_partition(
        model,
        2,
        example_inputs=(x, y),
        loss_fn=nn.functional.mse_loss,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        profile=kind,
        timeout_seconds=60.0,
        progress=lines.append,
    ) as parallel:
        losses = [float(parallel.train_step(x, y)) for _ in range(2)]
        plan = parallel.plan
    report = plan.profile
    assert report is not None and report.kind == kind and report.num_measured > 0
    assert all(block.measured[0] > 0 for block in report.blocks)
    assert plan.cluster.types[0].corrections is not None
    assert any("measure" in line for line in lines)
    assert any("plan again by measured times" in line for line in lines)

    plain = net()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for loss in losses:
        optimizer.zero_grad()
        wanted = nn.functional.mse_loss(plain(x), y)
        wanted.backward()
        optimizer.step()
        assert loss == pytest.approx(float(wanted.detach()), rel=1e-12)


def test_the_command_line_measures_lists_and_measures_no_second_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUTSET_CACHE", str(tmp_path / "cache"))
    model = tmp_path / "model.py"
    model.write_text(FACTORY)
    command = ["plan", f"{model}:build", "--devices", "2", "--profile", "blocks", "--json"]
    reports = []
    for turn in range(2):
        assert main([*command, "-o", str(tmp_path / f"{turn}.json")]) == 0
        reports.append(json.loads(capsys.readouterr().out)["profile"])
    assert reports[0]["num_measured"] > 0 == reports[1]["num_measured"]
    assert main(["profile", "list", "--json"]) == 0
    records = json.loads(capsys.readouterr().out)["records"]
    assert len(records) == reports[0]["num_measured"]
    assert main(["explain", str(tmp_path / "1.json")]) == 0
    assert "known before" in capsys.readouterr().out
