"""Workload files: both formats are read, ours is written, and what is wrong is named."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from cutset.compiler.ir.errors import UsageError
from cutset.compiler.ir.workload import DeviceKind, Operator, Workload
from cutset.compiler.workload_json import (
    load_workload,
    placement_to_json,
    save_workload,
    workload_from_json,
    workload_schema,
    workload_to_json,
)

PUBLIC: dict[str, Any] = {
    "maxSizePerFPGA": 100.0,
    "maxFPGAs": 2,
    "maxCPUs": 3,
    "nodes": [
        {"id": 7, "supportedOnFpga": 1, "cpuLatency": 10, "fpgaLatency": 1, "size": 40.0},
        {
            "id": 3,
            "supportedOnFpga": True,
            "cpuLatency": 20,
            "fpgaLatency": 2,
            "isBackwardNode": 0,
            "colorClass": 5,
            "size": 70.0,
        },
        {
            "id": 0,
            "supportedOnFpga": False,
            "cpuLatency": 1.5,
            "isBackwardNode": True,
            "colorClass": None,
        },
    ],
    "edges": [
        {"sourceId": 7, "destId": 3, "cost": 0.5},
        {"sourceId": 7, "destId": 0, "cost": 0.5},
    ],
}
OWN: dict[str, Any] = {
    "format": "cutset-workload",
    "format_version": 1,
    "devices": [
        {"kind": "cpu", "count": 2, "concurrent": True},
        {"kind": "gpu", "count": 1, "memory": 50},
    ],
    "colours": ["tied"],
    "operators": [
        {
            "name": "a",
            "times": {"cpu": 3, "gpu": 1},
            "transfers": {"cpu": 0, "gpu": 0.5},
            "colour": "tied",
        },
        {"name": "b", "times": {"cpu": 2, "gpu": None}, "size": 8},
    ],
    "edges": [["a", "b"]],
}


def changed(document: dict[str, Any], path: str, value: object) -> str:
    """The document as text, with the field at a dotted path set, or removed for `...`."""
    result = copy.deepcopy(document)
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    target: Any = result
    for part in parents:
        target = target[part]
    if value is ...:
        del target[last]
    elif isinstance(target, list) and last == len(target):
        target.append(value)
    else:
        target[last] = value
    return json.dumps(result)


def test_public_format() -> None:
    file = workload_from_json(json.dumps(PUBLIC))
    assert file.public
    work = file.workload
    assert work.kinds == (
        DeviceKind("cpu", 3, concurrent=True),
        DeviceKind("accelerator", 2, memory=100.0),
    )
    assert work.operators == (
        Operator("7", (10.0, 1.0), (0.0, 0.5), 40.0),
        Operator("3", (20.0, 2.0), (0.0, 0.0), 70.0, colour="5"),
        Operator("0", (1.5, None), (0.0, 0.0), backward=True),
    )
    assert work.edges == ((0, 1), (0, 2))
    assert file.view("latency").kinds[0].count == 1
    assert file.view("latency").num_devices == 3


def test_own_format() -> None:
    file = workload_from_json(json.dumps(OWN))
    assert not file.public
    assert file.workload.operators[1] == Operator("b", (2.0, None), (0.0, 0.0), 8.0)
    assert file.workload.operators[0].colour == "tied"
    assert file.workload.kinds[1] == DeviceKind("gpu", 1, memory=50.0)
    Draft202012Validator(workload_schema()).validate(OWN)


PUBLIC_FAULTS: list[tuple[str, object, str, str]] = [
    ("nodes.0.cpuLatency", ..., "cpuLatency is missing", "nodes[0] (id 7).cpuLatency"),
    ("nodes.1.fpgaLatency", ..., "fpgaLatency is missing", "nodes[1] (id 3).fpgaLatency"),
    ("nodes.0.cpuLatency", "fast", "not a number", "cpuLatency"),
    ("nodes.0.cpuLatency", True, "not a number", "cpuLatency"),
    ("nodes.0.cpuLatency", -1, "at least 0", "cpuLatency"),
    ("nodes.0.size", -5, "at least 0", "nodes[0] (id 7).size"),
    ("nodes.0.size", None, "not a number", "size"),
    ("nodes.1.id", 7, "two nodes have id 7", "nodes[1] (id 7).id"),
    ("nodes.1.id", "x", "not an integer", "id"),
    ("nodes.1.id", ..., "id is missing", "nodes[1].id"),
    ("nodes.1.colorClass", "red", "not an integer", "colorClass"),
    ("nodes.1.colorClass", -2, "no colour class", "colorClass"),
    ("nodes.1.colorClass", 1.5, "not an integer", "colorClass"),
    ("nodes.1.supportedOnFpga", 2, "neither true nor false", "supportedOnFpga"),
    ("nodes.1.supportedOnFpga", ..., "is missing", "supportedOnFpga"),
    ("nodes.1.isBackwardNode", "no", "neither true nor false", "isBackwardNode"),
    ("nodes.1", [], "not an object", "nodes[1]"),
    ("nodes", {}, "not a list", "nodes"),
    ("nodes", ..., "nodes is missing", "nodes"),
    ("edges", ..., "edges is missing", "edges"),
    ("edges.0.destId", 99, "no node has id 99", "edges[0].destId"),
    ("edges.0.sourceId", ..., "is missing", "edges[0].sourceId"),
    ("edges.0.cost", ..., "cost is missing", "edges[0].cost"),
    ("edges.0.cost", -1.0, "at least 0", "edges[0].cost"),
    ("edges.1.cost", 0.7, "two different costs, 0.5 and 0.7", "edges[1].cost"),
    ("edges.2", {"sourceId": 3, "destId": 7, "cost": 1}, "cycle", "edges"),
    ("edges.2", {"sourceId": 3, "destId": 3, "cost": 1}, "cycle", "edges"),
    ("maxFPGAs", -1, "not a number from 0", "maxFPGAs"),
    ("maxFPGAs", 2.5, "not an integer", "maxFPGAs"),
    ("maxFPGAs", 10**9, "not a number from 0", "maxFPGAs"),
    ("maxCPUs", ..., "is missing", "maxCPUs"),
    ("maxCPUs", 0, "no device supports it", "operator '0'"),
    ("maxSizePerFPGA", 10**400, "finite", "maxSizePerFPGA"),
]


@pytest.mark.parametrize(("path", "value", "cause", "where"), PUBLIC_FAULTS)
def test_malformed_public_files(path: str, value: object, cause: str, where: str) -> None:
    with pytest.raises(UsageError) as caught:
        workload_from_json(changed(PUBLIC, path, value), source="w.json")
    assert cause in caught.value.cause
    assert caught.value.where.startswith("w.json: ")
    assert where in caught.value.where


def test_no_nodes_at_all() -> None:
    with pytest.raises(UsageError, match="no operator"):
        workload_from_json(json.dumps({**PUBLIC, "nodes": [], "edges": []}))


OWN_FAULTS: list[tuple[str, object, str, str]] = [
    ("format", "other", "is not 'cutset-workload'", "format"),
    ("format_version", 2, "2 is not 1", "format_version"),
    ("surprise", 1, "unknown field", "surprise"),
    ("devices", [], "no device", "devices"),
    ("devices.0.count", 0, "no device supports it", "operator 'b'"),
    ("devices.1.kind", "cpu", "two kinds of device", "devices"),
    ("devices.1.memory", -1, "at least 0", "devices[1] (kind gpu).memory"),
    ("devices.1.memroy", 5, "unknown field", "memroy"),
    ("operators.1.name", "a", "two operators are called 'a'", "operators[1]"),
    ("operators.0.colour", "blue", "'blue' is not in the list", "operators[0] (name a).colour"),
    ("operators.0.times.gpu", ..., "gpu is missing", "operators[0] (name a).times.gpu"),
    ("operators.0.times.tpu", 1, "unknown field 'tpu'", "times.tpu"),
    ("operators.0.times.gpu", -1, "at least 0", "times.gpu"),
    ("operators.0.transfers", ..., "transfers is missing", "operators[0] (name a).transfers"),
    ("operators.0.transfers.gpu", None, "not a number", "transfers.gpu"),
    ("operators.1.size", "8", "not a number", "size"),
    ("operators.1.times.cpu", None, "no device supports it", "operator 'b'"),
    ("edges.0", ["a", "z"], "no operator is called 'z'", "edges[0]"),
    ("edges.0", ["a"], "pair of names", "edges[0]"),
    ("edges.1", ["a", "b"], "given twice", "edges[1]"),
]


@pytest.mark.parametrize(("path", "value", "cause", "where"), OWN_FAULTS)
def test_malformed_files_of_ours(path: str, value: object, cause: str, where: str) -> None:
    with pytest.raises(UsageError) as caught:
        workload_from_json(changed(OWN, path, value), source="w.json")
    assert cause in caught.value.cause
    assert where in caught.value.where


def test_a_cycle_is_spelled_out() -> None:
    text = changed(OWN, "operators.1.transfers", {"cpu": 0, "gpu": 0})
    document = json.loads(text)
    document["edges"].append(["b", "a"])
    with pytest.raises(UsageError, match="a -> b -> a|b -> a -> b"):
        workload_from_json(json.dumps(document))


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("", "not a complete JSON document"),
        ('{"nodes": [', "not a complete JSON document"),
        ("[1, 2]", "this is a list"),
        ("null", "this is a NoneType"),
        ('{"maxCPUs": NaN}', "NaN is not a JSON number"),
        ('{"maxCPUs": 1, "maxCPUs": 2}', "given twice"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_what_is_no_workload_at_all(text: str, cause: str) -> None:
    with pytest.raises(UsageError) as caught:
        workload_from_json(text)
    assert cause in caught.value.cause


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read the workload file: No such file"):
        load_workload(tmp_path / "none.json")
    with pytest.raises(UsageError, match="cannot read the workload file: Is a directory"):
        load_workload(tmp_path)
    (tmp_path / "binary").write_bytes(b"\x80\x02\xff\x00")
    with pytest.raises(UsageError, match="not UTF-8"):
        load_workload(tmp_path / "binary")


def test_devices_can_be_counted_anew() -> None:
    file = workload_from_json(json.dumps(PUBLIC))
    assert file.with_devices(5).workload.kinds[1].count == 5
    assert file.with_devices(5).workload.kinds[0].count == 3
    document = json.loads(workload_to_json(workload_from_json(json.dumps(OWN)).workload))
    document["devices"][1]["concurrent"] = True
    with pytest.raises(UsageError, match="no accelerator"):
        workload_from_json(json.dumps(document)).with_devices(1)


def test_placements_are_numbered_as_the_objective_says() -> None:
    file = workload_from_json(json.dumps(PUBLIC))
    document = json.loads(placement_to_json(file, "throughput", (3, 3, 0)))
    assert document["placement"] == {"7": 3, "3": 3, "0": 0}
    no_cpu = json.loads(changed(PUBLIC, "maxCPUs", 0))
    no_cpu["nodes"].pop()
    no_cpu["edges"].pop()
    file = workload_from_json(json.dumps(no_cpu))
    document = json.loads(placement_to_json(file, "latency", (0, 1), ((0,), (1,))))
    assert document["placement"] == {"7": 1, "3": 2}
    assert document["pieces"] == [
        {"device": 1, "operators": ["7"]},
        {"device": 2, "operators": ["3"]},
    ]


amounts = st.just(0.0) | st.floats(1e-99, 1e9)


@st.composite
def workloads(draw: st.DrawFn) -> Workload:
    kinds = tuple(
        DeviceKind(
            f"kind{k}", draw(st.integers(1, 3)), draw(st.none() | amounts), draw(st.booleans())
        )
        for k in range(draw(st.integers(1, 3)))
    )
    count = draw(st.integers(1, 6))
    operators = tuple(
        Operator(
            draw(st.sampled_from(["op", "λ", 'quo"te'])) + str(v),
            (draw(amounts), *(draw(st.none() | amounts) for _ in kinds[1:])),
            tuple(draw(amounts) for _ in kinds),
            draw(amounts),
            draw(st.none() | st.sampled_from("xyz")),
            draw(st.booleans()),
        )
        for v in range(count)
    )
    pairs = [(u, v) for u in range(count) for v in range(u + 1, count)]
    edges = draw(st.lists(st.sampled_from(pairs), unique=True)) if pairs else []
    return Workload(kinds, operators, tuple(edges))


@given(workloads())
@settings(max_examples=60, deadline=None)
def test_what_is_written_reads_back_and_fits_the_schema(workload: Workload) -> None:
    text = workload_to_json(workload)
    assert workload_from_json(text).workload == workload
    Draft202012Validator(workload_schema()).validate(json.loads(text))


def test_saved_files_are_whole(tmp_path: Path) -> None:
    workload = workload_from_json(json.dumps(OWN)).workload
    save_workload(workload, tmp_path / "w.json")
    assert load_workload(tmp_path / "w.json").workload == workload
    assert [path.name for path in tmp_path.iterdir()] == ["w.json"]
