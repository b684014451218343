"""`cutset place`: what it prints and writes, and how it fails."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cutset.compiler.cli import main
from cutset.compiler.workload_json import load_workload, save_workload
from cutset.cost_models.placement import (
    contiguity_breaks,
    device_loads,
    latency,
    piece_latency,
    violations,
)

METHODS = ("auto", "exact", "greedy", "interval-dp", "local-search")


def chain(count: int = 8, *, size: float = 10.0, memory: float = 40.0) -> dict[str, Any]:
    """A chain in the public format with two accelerators, a CPU and a branch at each operator."""
    nodes = [
        {
            "id": v,
            "supportedOnFpga": v % 5 != 4,
            "cpuLatency": 10.0 + v,
            "fpgaLatency": 1.0 + v / 10,
            "isBackwardNode": False,
            "colorClass": v if v != 1 else 0,
            "size": size,
        }
        for v in range(count)
    ]
    pairs = [(v, v + 1) for v in range(count - 1)] + [(v, v + 2) for v in range(0, count - 2, 2)]
    edges = [{"sourceId": u, "destId": v, "cost": 0.25 * (u % 3)} for u, v in pairs]
    return {
        "maxSizePerFPGA": memory,
        "maxFPGAs": 2,
        "maxCPUs": 1,
        "nodes": nodes,
        "edges": edges,
    }


@pytest.fixture
def workload(tmp_path: Path) -> Path:
    path = tmp_path / "workload.json"
    path.write_text(json.dumps(chain()))
    return path


@pytest.mark.parametrize("method", [*METHODS, "balanced-cut"])
@pytest.mark.parametrize("objective", ["throughput", "latency"])
@pytest.mark.parametrize("free", [False, True], ids=["contiguous", "free"])
def test_every_method(
    workload: Path, objective: str, method: str, free: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    target = workload.with_name("placement.json")
    arguments = ["place", str(workload), "--objective", objective, "--method", method, "--json"]
    arguments += ["-o", str(target), "--time-limit", "3", *(["--non-contiguous"] if free else [])]
    if method == "balanced-cut" and not free:
        assert main(arguments) == 2
        assert "--non-contiguous" in capsys.readouterr().err
        return
    assert main(arguments) == 0
    captured = capsys.readouterr()
    data = json.loads(captured.out)
    assert set(data) == {
        "objective",
        "objective_value",
        "lower_bound",
        "gap",
        "seconds",
        "loads",
        "method",
        "contiguous",
        "placement",
    }
    assert (data["objective"], data["contiguous"]) == (objective, not free)
    assert data["placement"] == str(target)
    assert 0 <= data["lower_bound"] <= data["objective_value"]
    assert data["gap"] == pytest.approx(1 - data["lower_bound"] / data["objective_value"])
    assert "value" in captured.err
    assert "gap" in captured.err
    check_placement(workload, target, data, objective, free)


def check_placement(
    workload: Path, target: Path, data: dict[str, Any], objective: str, free: bool
) -> None:
    """The file says what the figures say."""
    view = load_workload(workload).view("latency" if objective == "latency" else "throughput")
    document = json.loads(target.read_text())
    names = [operator.name for operator in view.operators]
    placement = [document["placement"][name] for name in names]
    assert violations(view, placement) == ()
    loads = device_loads(view, placement)
    assert [row["total"] for row in data["loads"]] == pytest.approx([x.total for x in loads])
    assert [row["kind"] for row in data["loads"]] == ["cpu", "accelerator", "accelerator"]
    assert sum(row["memory"] for row in data["loads"]) == 80.0
    if objective == "throughput":
        value: float | None = max(load.total for load in loads)
        assert free or contiguity_breaks(view, placement) == ()
    elif free:
        pieces = [[names.index(v) for v in piece["operators"]] for piece in document["pieces"]]
        value = piece_latency(view, placement, pieces)
    else:
        assert "pieces" not in document
        value = latency(view, placement)
    assert data["objective_value"] == value


def test_auto_is_no_worse_than_any_baseline(
    workload: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for objective in ("throughput", "latency"):
        values = {}
        for method in METHODS:
            arguments = ["--objective", objective, "--method", method, "--time-limit", "5"]
            assert main(["place", str(workload), "--json", *arguments]) == 0
            values[method] = json.loads(capsys.readouterr().out)
        best = min(data["objective_value"] for data in values.values())
        assert values["auto"]["objective_value"] == pytest.approx(best, rel=1e-9)
        assert values["auto"]["gap"] <= 1e-4
        assert values["exact"]["gap"] <= 1e-5


def test_number_of_accelerators(workload: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["place", str(workload), "--devices", "3", "--json"]) == 0
    kinds = [row["kind"] for row in json.loads(capsys.readouterr().out)["loads"]]
    assert kinds == ["cpu", "accelerator", "accelerator", "accelerator"]


def test_text_and_no_file(
    workload: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["place", str(workload)]) == 0
    text = capsys.readouterr().out
    assert text.startswith("throughput ")
    assert "device 2 (accelerator): " in text
    assert [path.name for path in tmp_path.iterdir()] == ["workload.json"]


def test_torch_is_not_loaded(workload: Path) -> None:
    """The time limit counts from the start of the command, of which torch can take most."""
    script = (
        "import sys; from cutset.compiler.cli import main; "
        f"main(['place', {str(workload)!r}, '--method', 'greedy']); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == 0


def test_both_formats_are_placed_alike(
    workload: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "own.json"
    save_workload(load_workload(workload).workload, own)
    values = []
    for path in (workload, own):
        assert main(["place", str(path), "--objective", "latency", "--json"]) == 0
        values.append(json.loads(capsys.readouterr().out)["objective_value"])
    assert values[0] == values[1]


def broken(**fields: object) -> str:
    return json.dumps({**chain(), **fields})


def with_node(**fields: object) -> str:
    document = chain()
    document["nodes"][0] |= fields
    return json.dumps(document)


def with_edge(**fields: object) -> str:
    document = chain()
    document["edges"].append({"sourceId": 0, "destId": 7, "cost": 0.0, **fields})
    return json.dumps(document)


def without(collection: str, field: str) -> str:
    document = chain()
    del document[collection][0][field]
    return json.dumps(document)


MALFORMED = {
    "cycle": (with_edge(sourceId=7, destId=0), "cycle: 0 -> "),
    "missing cost": (without("edges", "cost"), "cost is missing"),
    "missing time": (without("nodes", "cpuLatency"), "cpuLatency is missing"),
    "unknown colour": (with_node(colorClass="mauve"), "colorClass"),
    "negative size": (with_node(size=-1), "-1 is not a finite number of at least 0"),
    "huge time": (with_node(cpuLatency=1e308), "1e+308 is out of range"),
    "tiny time": (with_node(cpuLatency=1e-200), "1e-200 is out of range"),
    "NaN": (with_node(size=float("nan")), "NaN is not a JSON number"),
    "duplicate id": (with_node(id=3), "two nodes have id 3"),
    "unknown end": (with_edge(destId=80), "no node has id 80"),
    "two costs": (with_edge(cost=9.0), "node 0 has two different costs"),
    "no device": (broken(maxCPUs=0), "no device supports it"),
    "not JSON": ("nodes: []", "not a complete JSON document"),
    "cut short": (broken()[:200], "not a complete JSON document"),
    "wrong top level": ("[]", "this is a list"),
    "empty": ("{}", "is missing"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_files(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, message = MALFORMED[name]
    path = tmp_path / "bad.json"
    path.write_text(text)
    target = tmp_path / "placement.json"
    assert main(["place", str(path), "--json", "-o", str(target)]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "bad.json" in captured.err
    assert json.loads(captured.out)["error"]["kind"] == "UsageError"
    assert "Traceback" not in captured.err
    assert not target.exists()


def test_binary_and_missing_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    for name in ("binary", "none.json"):
        assert main(["place", str(tmp_path / name)]) == 2
        assert name in capsys.readouterr().err


INFEASIBLE = {
    "total memory": chain(12, size=10.0, memory=50.0) | {"maxCPUs": 0},
    "one operator": chain(4, size=60.0, memory=40.0) | {"maxCPUs": 0},
}


@pytest.mark.parametrize("objective", ["throughput", "latency"])
@pytest.mark.parametrize("name", INFEASIBLE)
def test_infeasible_memory(
    name: str, objective: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = INFEASIBLE[name]
    for node in document["nodes"]:
        node["supportedOnFpga"] = True
    path, target = tmp_path / "workload.json", tmp_path / "placement.json"
    path.write_text(json.dumps(document))
    target.write_text("kept")
    arguments = ["place", str(path), "--objective", objective, "--json", "-o", str(target)]
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out)["error"]["kind"] == "InfeasibleError"
    assert "bytes" in captured.err
    assert target.read_text() == "kept"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["placement.json", "workload.json"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--objective", "fame"],
        ["--method", "luck"],
        ["--devices", "-1"],
        ["--gap", "1.5"],
        ["--gap", "nan"],
        ["--time-limit", "0"],
    ],
)
def test_malformed_arguments(
    workload: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["place", str(workload), *arguments]) == 2
    assert capsys.readouterr().out == ""


def test_a_target_that_cannot_be_written_is_found_first(
    workload: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for target in (tmp_path, tmp_path / "none" / "placement.json"):
        assert main(["place", str(workload), "-o", str(target)]) == 2
        assert "value" not in capsys.readouterr().err


def test_as_a_program(workload: Path) -> None:
    command = [sys.executable, "-m", "cutset", "place", str(workload), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert json.loads(done.stdout)["gap"] <= 1e-4
    assert "[" in done.stderr
