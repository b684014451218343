"""Whoever reads a file that cutset writes sees the old one or the new one, whatever interrupts."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy
import onnx
import pytest
import torch

from cutset.compiler.chrome_trace import chrome_trace, write_chrome_trace
from cutset.compiler.export import onnx as onnx_module
from cutset.compiler.export import to_onnx
from cutset.compiler.files import check_target, set_aside, write_whole
from cutset.compiler.ir.errors import UsageError
from cutset.compiler.ir.graph import ValueKind
from cutset.compiler.ir.trace import Lane, TraceEvent
from cutset.compiler.ir.workload import DeviceKind, Operator, Workload
from cutset.compiler.plan_json import save_plan
from cutset.compiler.workload_json import save_placement, save_workload
from cutset.cost_models.cluster_file import write_cluster
from cutset.cost_models.presets import preset
from tests.compiler.plans import plan_of
from tests.ir.builders import mlp

GRAPH = mlp(num_layers=2)
PLAN = plan_of(GRAPH, (0, 1), (2, 3, 4))
WORKLOAD = Workload((DeviceKind("cpu", 2),), (Operator("a", (1.0,), (0.0,)),), ())
TRACE = chrome_trace([TraceEvent(0, Lane.COMPUTE, "F 0.0", 0.0, 1.0)])
TENSORS = {
    value.origin: torch.ones(value.type.shape)
    for value in GRAPH.values
    if value.kind is ValueKind.PARAMETER
}

WRITERS: dict[str, Callable[[Path], None]] = {
    "plan.json": lambda path: save_plan(PLAN, path),
    "plan.onnx": lambda path: to_onnx(PLAN, GRAPH, path, tensors=TENSORS),
    "cluster.toml": lambda path: write_cluster(preset("cpu-node"), path),
    "trace.json": lambda path: write_chrome_trace(path, TRACE),
    "workload.json": lambda path: save_workload(WORKLOAD, path),
    "placement.json": lambda path: save_placement("{}", path),
}


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _no_space(*_: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize(
    ("failure", "error"), [(_interrupt, KeyboardInterrupt), (_no_space, UsageError)]
)
def test_an_interrupted_write_leaves_what_was_there(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    failure: Callable[..., None],
    error: type[BaseException],
) -> None:
    target = tmp_path / name
    target.write_text("before")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failure)
        with pytest.raises(error):
            WRITERS[name](target)
    assert target.read_text() == "before"
    assert os.listdir(tmp_path) == [name]
    WRITERS[name](target)
    assert target.read_bytes() != b"before"


def test_a_killed_writer_leaves_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "plan.json"
    target.write_text("before")
    script = f"""
import os, pathlib, signal
from cutset.compiler.files import write_whole
os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
write_whole(pathlib.Path({str(target)!r}), "after", "plan")
"""
    ended = subprocess.run([sys.executable, "-c", script], timeout=60)
    assert ended.returncode == -signal.SIGKILL
    assert target.read_text() == "before"


def _large_onnx(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is more than a message of protobuf may hold, without its bytes."""
    monkeypatch.setattr(onnx_module, "_EXTERNAL_DATA_BYTES", 0)


def test_contents_beside_an_onnx_file_come_with_it_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _large_onnx(monkeypatch)
    wide = mlp(num_layers=2, width=64)
    plan = plan_of(wide, (0, 1), (2, 3, 4))
    weights = {
        value.origin: torch.full(value.type.shape, 3.0)
        for value in wide.values
        if value.kind is ValueKind.PARAMETER
    }
    target = tmp_path / "plan.onnx"
    for _ in range(2):  # the second time in place of the first
        to_onnx(plan, wide, target, tensors=weights)
    assert sorted(os.listdir(tmp_path)) == ["plan.onnx", "plan.onnx.data"]
    assert (tmp_path / "plan.onnx.data").stat().st_size == 2 * 64 * 64 * 4
    read = {item.name: item for item in onnx.load(target).graph.initializer}
    for item in read.values():
        assert numpy.all(onnx.numpy_helper.to_array(item) == 3.0)

    monkeypatch.setattr(os, "fsync", _interrupt)
    before = target.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        to_onnx(plan, wide, target, tensors=weights)
    assert sorted(os.listdir(tmp_path)) in (["plan.onnx.data"], ["plan.onnx", "plan.onnx.data"])
    assert not target.exists() or target.read_bytes() == before


def test_files_that_refer_to_others_need_a_folder() -> None:
    with (
        pytest.raises(UsageError, match="needs others beside it"),
        set_aside(Path(os.devnull), "ONNX"),
    ):
        pytest.fail("there is no folder to write to")


def test_a_link_stays_and_leads_to_the_new_file(tmp_path: Path) -> None:
    (tmp_path / "real.json").write_text("before")
    (tmp_path / "link.json").symlink_to("real.json")
    write_whole(tmp_path / "link.json", "after", "plan")
    assert (tmp_path / "link.json").is_symlink()
    assert (tmp_path / "real.json").read_text() == "after"


@pytest.mark.parametrize(
    ("device", "cause"), [("/dev/null", None), ("/dev/full", "No space left on device")]
)
def test_devices_are_written_to_and_not_replaced(device: str, cause: str | None) -> None:
    path = Path(device)
    if not path.exists():
        pytest.skip(f"this system has no {device}")
    check_target(path, "plan")
    if cause is None:
        write_whole(path, "text", "plan")
    else:
        with pytest.raises(UsageError, match=cause):
            write_whole(path, "text", "plan")
    assert stat.S_ISCHR(path.stat().st_mode)


def test_a_target_is_checked_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="this is a folder"):
        check_target(tmp_path, "plan")
    with pytest.raises(UsageError, match="its folder does not exist"):
        check_target(tmp_path / "none" / "plan.json", "plan")
    check_target(tmp_path / "plan.json", "plan")
    assert os.listdir(tmp_path) == []
