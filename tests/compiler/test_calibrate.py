"""Calibration on real workers, and the cluster files that come of it."""

from __future__ import annotations

import io
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cutset.compiler.calibrate import (
    FULL,
    Calibration,
    Effort,
    _Measuring,
    calibrate,
    local_devices,
)
from cutset.compiler.calibration_text import calibration_file, figure_lines
from cutset.compiler.cli import main
from cutset.compiler.cli.calibrate import _say_if_busy
from cutset.compiler.cli.console import Console
from cutset.compiler.ir.cluster import COLLECTIVES, HANDLED, PHASES, DeviceType
from cutset.compiler.ir.errors import UsageError
from cutset.compiler.ir.text import parse_program
from cutset.compiler.ir.verify import verify_cluster
from cutset.compiler.probes import Probe, Work, op_probes, rate_probes, tiny_probe, work_of
from cutset.cost_models import make_cluster
from cutset.cost_models.cluster_file import parse_cluster, write_cluster
from cutset.cost_models.fits import Quality, left_out
from cutset.cost_models.presets import parse_devices, preset

LITTLE = Effort((("cpu", ("f32",)),), every=3, most=2, link_bytes=(1 << 12, 1 << 20), rounds=6)
FACTORY = """
import torch

def make():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    return {"model": model, "args": (torch.ones(2, 4),), "loss_fn": lambda output: output.mean()}
"""


def test_two_workers_are_measured() -> None:
    said: list[str] = []
    found = calibrate(parse_devices("cpu:2"), effort=LITTLE, progress=said.append)
    cluster = found.cluster
    verify_cluster(cluster)
    assert cluster.local and len(cluster.devices) == 2 and found.seconds > 0.0
    (kind,) = cluster.types
    assert (kind.name, kind.backend) == ("cpu-core", "cpu")
    assert 1e8 < kind.memory_bytes_per_second < 1e12 and kind.memory_bytes > 1 << 27
    assert 1e-8 < kind.overhead_seconds < 1e-3 and 1e-7 < kind.instruction_seconds < 1e-1
    assert {curve.kind for curve in kind.curves} == {"memory", "matmul", "attention", "convolution"}
    assert kind.op_cost("layer_norm", "norm", "backward_weight") is not None
    assert kind.op_cost("adamw", "optimizer", "forward") is not None
    assert {cost.phase for cost in kind.op_costs} == set(PHASES)
    (rule,) = cluster.links
    assert [name for name, _ in rule.collectives] == list(COLLECTIVES)
    assert 0.0 <= rule.compute_share <= 1.0 and 0.0 < rule.progress_share <= 1.0
    assert rule.compute_share * rule.progress_share < 1.0
    assert 0.0 <= rule.skew_seconds < 0.1
    assert [name for name, _ in rule.handling] == list(HANDLED)
    assert all(link.latency_seconds < 0.1 for _, link in rule.handling)
    titles = [title for title, _ in found.qualities]
    measured = 1 + len(COLLECTIVES) + len(HANDLED)
    assert titles == ["cpu-core", "links"] and len(found.qualities[1][1]) == measured
    assert {"messages", "all-reduce", "instructions"} <= set(said)
    for format in ("toml", "json"):
        assert parse_cluster(calibration_file(found, format=format), format=format) == cluster


class OnCuda:
    """Answers for two CUDA devices that are as fast as they are said to be here."""

    num_ranks = 2
    BYTES_PER_SECOND = 1e12
    CALL_SECONDS, INSTRUCTION_SECONDS = 1e-4, 5e-5

    def call(
        self, method: str, arguments: Any = (), *, timeout_seconds: float | None = None
    ) -> list[Any]:
        if method == "time_instructions":
            return [self.INSTRUCTION_SECONDS] * 2
        if method == "time_host":
            sizes = (1 << 12, 1 << 26)
            ways = {way: [(n, 1e-5 + n / 2e10) for n in sizes] for way in ("down", "up", "host")}
            return [ways] * 2
        assert method == "time_optimizer"
        passes = 8 if arguments[0]["spec"].class_name.endswith("AdamW") else 6
        return [
            [
                self.CALL_SECONDS + 4.0 * elements * count * passes / self.BYTES_PER_SECOND
                for elements, count in given["sizes"]
            ]
            for given in arguments
        ]

    def close(self) -> None: ...


class OnFewCores:
    """Answers for four CPU workers of one thread each, on so many cores."""

    num_ranks = 4

    def __init__(self, cores: int) -> None:
        self._cores = cores

    def call(
        self, method: str, arguments: Any = (), *, timeout_seconds: float | None = None
    ) -> list[Any]:
        if method == "describe":
            return [{"node": "here", "cores": self._cores, "memory_bytes": 1 << 34}] * 4
        if method == "time_instructions":
            return [1e-5] * 4
        assert method == "time_block"
        return [tuple(1e-6 * work.kernels for work in self._works(given)) for given in arguments]

    def _works(self, given: dict[str, Any]) -> tuple[Work, ...]:
        return work_of(Probe("op", "", "", 1.0, 1, parse_program(given["program"])))

    def close(self) -> None: ...


@pytest.mark.parametrize(("cores", "share"), [(16, 1.0), (4, 1.0), (3, 0.75), (2, 0.5), (1, 0.25)])
def test_workers_on_few_cores_take_longer(cores: int, share: float) -> None:
    """By the clocks of their threads all is as with cores of their own."""
    (kind,) = parse_devices("cpu:4").types
    cluster = replace(parse_devices("cpu:4"), types=(replace(kind, threads=1),))
    measuring = _Measuring(OnFewCores(cores), cluster, FULL, lambda line: None)
    measuring._shared()
    measuring._overhead()
    measuring._instructions()
    kind = measuring._types[0].kind
    assert kind.cores == (None if share == 1.0 else cores)
    assert kind.memory_bytes == int(0.7 * (1 << 32)) >> 20 << 20
    assert kind.overhead_seconds == pytest.approx(1e-6 / share, rel=0.01)
    assert kind.instruction_seconds == pytest.approx(8e-6 / share, rel=0.01)


def on_cuda() -> DeviceType:
    cluster = make_cluster("h200", 2)
    (kind,) = cluster.types
    assert kind.host is not None
    host = replace(kind.host, memory_bytes=94603995136)
    cluster = replace(cluster, types=(replace(kind, overhead_seconds=2e-6, host=host),))
    measuring = _Measuring(OnCuda(), cluster, FULL, lambda line: None)
    measuring._instructions()
    measuring._optimizers()
    measuring._hosts()
    return measuring._types[0].kind


def test_optimizers_on_cuda_update_more_than_caches_hold() -> None:
    """All tensors at once, up to the sizes at which memory is what takes time."""
    kind = on_cuda()
    cost = kind.op_cost("adamw", "optimizer", "forward")
    assert cost is not None
    assert cost.kernels * kind.overhead_seconds == pytest.approx(OnCuda.CALL_SECONDS, rel=0.05)
    assert cost.points[-1][0] == pytest.approx(8 * 4 * (4 << 24), rel=1e-3)
    assert cost.points[-1][1] == pytest.approx(OnCuda.BYTES_PER_SECOND, rel=0.01)


class HalfIsSlow:
    """Answers for two CPU workers that move bytes in bf16 at a third of the rate of f32."""

    num_ranks = 2
    BYTES_PER_SECOND = 9e9

    def call(
        self, method: str, arguments: Any = (), *, timeout_seconds: float | None = None
    ) -> list[Any]:
        assert method == "time_block"
        return [self._times(given) for given in arguments]

    def _times(self, given: dict[str, Any]) -> tuple[float, ...]:
        program = parse_program(given["program"])
        rate = self.BYTES_PER_SECOND / (3 if "bf16[" in given["program"] else 1)
        works = work_of(Probe("op", "", "", 1.0, 1, program))
        return tuple(work.kernels * 1e-6 + work.num_bytes / rate for work in works)

    def close(self) -> None: ...


def measured_ops(bf16_rate: float, said: list[str]) -> DeviceType:
    cluster = parse_devices("cpu:2")
    (kind,) = cluster.types
    rates = (("f32", 1e11), ("bf16", bf16_rate))
    kind = replace(kind, overhead_seconds=1e-6, flops_per_second=rates)
    measuring = _Measuring(HalfIsSlow(), replace(cluster, types=(kind,)), FULL, said.append)
    measuring._ops()
    return measuring._types[0].kind


def test_operators_are_measured_in_half_precision_where_it_is_of_use() -> None:
    said: list[str] = []
    kind = measured_ops(2e11, said)
    assert said == ["kinds of operators", "kinds of operators in bf16"]
    for name, category in (("gelu", "elementwise"), ("layer_norm", "norm"), ("mul", "elementwise")):
        for phase in ("forward", "backward_input"):
            whole, half = (
                kind.op_cost(name, category, phase, dtype)
                for dtype in (torch.float32, torch.bfloat16)
            )
            assert whole is not None and half is not None
            assert (whole.dtype, half.dtype) == ("", "bf16")
            assert kind.op_rate(whole, 1e7) == pytest.approx(9e9, rel=0.1)
            assert kind.op_rate(half, 1e7) == pytest.approx(3e9, rel=0.1)
    said.clear()
    slow = measured_ops(1e10, said)
    assert said == ["kinds of operators"]
    assert all(not cost.dtype for cost in slow.op_costs)


def test_instructions_on_cuda_take_the_time_of_the_host_alone() -> None:
    """The device works on operators meanwhile: their overhead is none of the host's."""
    assert on_cuda().instruction_seconds == OnCuda.INSTRUCTION_SECONDS


def test_memory_of_the_host_is_whole_mebibytes() -> None:
    host = on_cuda().host
    assert host is not None and host.memory_bytes == 94603995136 >> 20 << 20
    assert host.memory_bytes_per_second == pytest.approx(4e10, rel=0.01)
    assert host.link.bytes_per_second == pytest.approx(2e10, rel=0.01)


def test_fits_stand_in_the_file_as_comments() -> None:
    qualities = (("cpu-core", (Quality("matmul f32", 5, 0.031, 0.12),)),)
    text = calibration_file(Calibration(parse_devices("cpu:2"), qualities, 41.7))
    assert "# measured by cutset calibrate in 42 s, torch" in text
    line = next(line for line in text.splitlines() if "matmul f32" in line)
    assert line.startswith("# cpu-core: matmul f32") and line.split()[-3:] == ["5", "3.1%", "12.0%"]
    assert any("any number of messages" in row for row in figure_lines(parse_devices("h100:2")))


def test_a_busy_machine_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    told = io.StringIO()
    monkeypatch.setattr(os, "getloadavg", lambda: (0.01, 9.0, 9.0))
    _say_if_busy(Console(False, err=told))
    assert told.getvalue() == ""
    monkeypatch.setattr(os, "getloadavg", lambda: (1e4, 0.0, 0.0))
    _say_if_busy(Console(False, err=told))
    assert "this machine is busy (load 10000.0 on" in told.getvalue()


def test_what_was_not_measured_has_no_quality() -> None:
    name = "_native_batch_norm_legit_functional backward_input"
    few = left_out([(1e5, 2e-5), (1e6, 2e-4)], 0.0, name)
    found = Calibration(parse_devices("cpu:1"), (("cpu-core", (few,)),), 1.0)
    text = calibration_file(found)
    head, row = (next(r for r in text.splitlines() if key in r) for key in ("samples", name))
    assert row.split()[-3:] == ["0", "-", "-"] and len(row) == len(head)
    lines = (text, "\n".join(figure_lines(found.cluster)))
    assert all("one device has no links to measure" in told for told in lines)
    assert "GB/s\nlink" not in lines[1]


def test_probes_count_what_the_cost_model_counts() -> None:
    """A product of n x n matrices: 2 n^3 operations in every phase, one kernel each."""
    *_, probe = rate_probes("matmul", "f32", on_cuda=False)
    for work in work_of(probe):
        assert work.flops == pytest.approx(probe.size) and work.kernels == pytest.approx(1.0)
    (forward, *backward) = work_of(tiny_probe(5))
    assert forward.num_bytes == 96.0 and forward.kernels == 1.0
    assert all(work.num_bytes == 0.0 for work in backward)
    for probes in op_probes("f32", on_cuda=False):
        sizes = [work_of(probe)[0].num_bytes for probe in probes]
        assert sizes == sorted(sizes) and sizes[0] > 0.0


def test_only_devices_of_this_machine_are_measured(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="h100-node are not devices of this machine"):
        local_devices("h100-node")
    tpus = replace(preset("tpu-like-slice"), local=True)
    write_cluster(tpus, tmp_path / "mine.toml")
    with pytest.raises(UsageError, match=r"mine.toml are not devices of this machine"):
        local_devices(str(tmp_path / "mine.toml"))
    assert local_devices("cpu:3") == parse_devices("cpu:3")
    assert local_devices(None).local


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("cluster.yaml", "a cluster file is .toml or .json, not .yaml"),
        ("cluster", "not without a suffix"),
        ("nowhere/cluster.toml", "its folder does not exist"),
    ],
)
def test_a_file_that_cannot_be_written_is_refused_at_once(
    output: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["calibrate", "--devices", "cpu:1", "-o", str(tmp_path / output)]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.out == ""
    assert "starting" not in captured.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs a folder that takes no files")
@pytest.mark.parametrize(
    "command",
    [
        ["calibrate", "--devices", "cpu:1", "-o", "/proc/cluster.toml"],
        ["plan", "nowhere.py:make", "--devices", "2", "-o", "/proc/plan.json"],
    ],
    ids=lambda command: command[0],
)
def test_a_folder_that_takes_no_files_is_found_out_before_the_work(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """/proc, as even root cannot write there."""
    assert main(command) == 2
    error = capsys.readouterr().err
    assert f"cannot write the {command[-1][6:].split('.')[0]} file" in error
    assert "starting" not in error and "load" not in error


@pytest.mark.parametrize(
    ("old", "new", "message", "line", "remedy"),
    [
        ('type = "cpu-core"', 'type = "gpu"', "unknown device type 'gpu'", '"gpu"', "cpu-core"),
        ('"10 GB/s"', '"0 GB/s"', "memory_bandwidth = '0 GB/s' must be positive",
         "memory_bandwidth", "calibrate"),
        ('"10 GB/s"', '"10 GFLOP/s"', "is not a quantity", "memory_bandwidth", "GB/s"),
        ("[[links]]", "[[links]]\nsame_node = false", "no link between device 0", "links", "rule"),
        ('"2 GB/s"', '"0 GB/s"', "bandwidth = '0 GB/s' must be positive", "bandwidth", "calibrate"),
        ("[[links]]", '[[links]]\nall_reduce = { latency = "1 us" }',
         "links.all_reduce.bandwidth is missing", "all_reduce", "add it"),
    ],
)  # fmt: skip
def test_the_command_line_refuses_wrong_cluster_files(
    old: str,
    new: str,
    message: str,
    line: str,
    remedy: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cluster = replace(parse_devices("cpu:2"), local=True)
    text = calibration_file(Calibration(cluster, (), 1.0))
    assert old in text
    wrong = text.replace(old, new)
    (tmp_path / "wrong.toml").write_text(wrong)
    (tmp_path / "model.py").write_text(FACTORY)
    model, plan = f"{tmp_path / 'model.py'}:make", tmp_path / "plan.json"
    arguments = ["plan", model, "--devices", str(tmp_path / "wrong.toml"), "-o", str(plan)]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and remedy in error and not plan.exists()
    place = next(part for part in error.split() if "wrong.toml:" in part)
    number = int(place.rsplit(":", 1)[1])
    assert line in "\n".join(wrong.splitlines()[number - 1 : number + 1])


@pytest.mark.slow
def test_the_verb_writes_a_file_that_plans_use(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "cluster.toml"
    assert main(["calibrate", "--devices", "2", "--quick", "--json", "-o", str(target)]) == 0
    assert '"fits": [' in capsys.readouterr().out
    assert "# cpu-core: matmul f32" in target.read_text()
    (tmp_path / "model.py").write_text(FACTORY)
    plan = tmp_path / "plan.json"
    model = f"{tmp_path / 'model.py'}:make"
    assert main(["plan", model, "--devices", str(target), "-o", str(plan)]) == 0
    assert main(["run", model, "--plan", str(plan), "--steps", "1"]) == 0
