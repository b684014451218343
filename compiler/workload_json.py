"""Workload and placement files: operator graphs with costs, and where their operators run.

Two formats are read. Ours has `"format": "cutset-workload"`; `docs/workload-format.md` explains its
fields, `schemas/workload.schema.json` is its schema. The other is that of the public workloads of
Tarnawski et al., "Efficient Algorithms for Device Placement of DNN Graph Operators" (NeurIPS 2020),
where "FPGA" stands for any accelerator: a CPU pays for no transfer, has no memory limit and is
concurrent. Reading checks every field by itself, since a schema's messages name no operator.
"""

from __future__ import annotations

import importlib.resources
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from .files import unusable, write_whole
from .ir.errors import UsageError
from .ir.workload import DeviceKind, Operator, Placement, Workload
from .json_fields import Fields, parse_object

__all__ = [
    "FORMAT_VERSION",
    "Objective",
    "WorkloadFile",
    "load_workload",
    "placement_to_json",
    "save_placement",
    "save_workload",
    "workload_from_json",
    "workload_schema",
    "workload_to_json",
]

FORMAT_VERSION = 1
Objective = Literal["throughput", "latency"]

_FORMAT = "cutset-workload"
_MOST_DEVICES = 100_000
_LEAST, _LARGEST = 1e-100, 1e100  # of figures other than 0: products and sums stay in range
_SAME_COST = 1e-6  # the public files repeat a producer's cost on every edge, rounded
_WAY_OUT = ("correct the workload file; docs/workload-format.md describes it",)


@dataclass(frozen=True, slots=True)
class WorkloadFile:
    """What a workload file holds.

    Args:
        source: the file's name, for messages.
        workload: its graph and devices, as for throughput.
        public: it has the format of the public workloads.
    """

    source: str
    workload: Workload
    public: bool

    def with_devices(self, count: int) -> WorkloadFile:
        """The same with `count` devices of the last kind that is not concurrent, an accelerator.

        Raises:
            UsageError: an operator is left without a device.
        """
        kinds = list(self.workload.kinds)
        last = max((k for k, kind in enumerate(kinds) if not kind.concurrent), default=None)
        if last is None:
            raise UsageError(
                "the workload has no accelerator whose number could be changed",
                where=self.source,
                ways_out=("leave --devices out",),
            )
        kinds[last] = replace(kinds[last], count=count)
        workload = _build(self.source, tuple(kinds), self.workload.operators, self.workload.edges)
        return replace(self, workload=workload)

    def view(self, objective: Objective) -> Workload:
        """The workload as one objective numbers its devices.

        For latency the devices of a concurrent kind are one device, as nothing waits there.
        """
        if objective == "throughput":
            return self.workload
        kinds = tuple(
            replace(kind, count=min(kind.count, 1)) if kind.concurrent else kind
            for kind in self.workload.kinds
        )
        return Workload(kinds, self.workload.operators, self.workload.edges)

    def first_device(self, objective: Objective) -> int:
        """Number that files give to device 0: public latency files keep 0 for CPUs, present or
        not."""
        absent = self.public and objective == "latency" and self.workload.kinds[0].count == 0
        return 1 if absent else 0


def load_workload(path: str | os.PathLike[str]) -> WorkloadFile:
    """Read and check a workload file of either format.

    Raises:
        UsageError: the file cannot be read, or its content is malformed; file and field are named.
    """
    source = Path(path)
    try:
        text = source.read_bytes().decode("utf-8")
    except OSError as error:
        raise unusable(source, "read", "workload", error) from error
    except UnicodeDecodeError as error:
        raise UsageError(
            "the file is not UTF-8 text; is this a workload?",
            where=f"{source}: byte {error.start}",
            ways_out=("name a workload file in JSON",),
        ) from error
    return workload_from_json(text, source=str(source))


def workload_from_json(text: str, *, source: str = "workload") -> WorkloadFile:
    """The workload that `text` describes; see `load_workload`."""
    top = Fields(source, "", parse_object(text, source, "workload"), _WAY_OUT)
    if "format" in top.table:
        return WorkloadFile(source, _read_own(top), public=False)
    return WorkloadFile(source, _read_public(top), public=True)


def _build(
    source: str,
    kinds: tuple[DeviceKind, ...],
    operators: tuple[Operator, ...],
    edges: tuple[tuple[int, int], ...],
) -> Workload:
    for operator in operators:
        for figure in (*operator.times, *operator.transfers, operator.size):
            if figure and not _LEAST <= figure <= _LARGEST:
                raise UsageError(
                    f"{figure:g} is out of range; figures other than 0 are from {_LEAST:g} to"
                    f" {_LARGEST:g}",
                    where=f"{source}: operator {operator.name!r}",
                    ways_out=("measure in another unit",),
                )
    try:
        return Workload(kinds, operators, edges)
    except UsageError as error:
        where = f"{source}: {error.where}"
        raise UsageError(error.cause, where=where, ways_out=error.ways_out) from error


def _read_public(top: Fields) -> Workload:
    cpus = top.count("maxCPUs", _MOST_DEVICES)
    accelerators = top.count("maxFPGAs", _MOST_DEVICES)
    kinds = (
        DeviceKind("cpu", cpus, concurrent=True),
        DeviceKind("accelerator", accelerators, memory=top.amount("maxSizePerFPGA")),
    )
    nodes = top.objects("nodes", name_field="id")
    position: dict[int, int] = {}
    for number, node in enumerate(nodes):
        identity = node.integer("id")
        if identity in position:
            node.refuse("id", f"two nodes have id {identity}")
        position[identity] = number
    costs: dict[int, float] = {}
    edges: dict[tuple[int, int], None] = {}
    for edge in top.objects("edges"):
        ends = [edge.integer(name) for name in ("sourceId", "destId")]
        for name, end in zip(("sourceId", "destId"), ends, strict=True):
            if end not in position:
                edge.refuse(name, f"no node has id {end}")
        cost = edge.amount("cost")
        producer, consumer = (position[end] for end in ends)
        if abs(costs.setdefault(producer, cost) - cost) > _SAME_COST:
            edge.refuse(
                "cost",
                f"node {ends[0]} has two different costs, {costs[producer]:g} and {cost:g}; "
                "all its edges move the same result",
            )
        edges[producer, consumer] = None
    operators = tuple(
        _public_operator(node, costs.get(number, 0.0)) for number, node in enumerate(nodes)
    )
    return _build(top.source, kinds, operators, tuple(edges))


def _public_operator(node: Fields, cost: float) -> Operator:
    supported = node.flag("supportedOnFpga")
    colour = node.table.get("colorClass")
    if colour is not None and (node.integer("colorClass") < 0):
        node.refuse("colorClass", f"{colour} is no colour class; classes are numbered from 0")
    return Operator(
        name=str(node.integer("id")),
        times=(node.amount("cpuLatency"), node.amount("fpgaLatency") if supported else None),
        transfers=(0.0, cost),
        size=node.amount("size", default=0.0),
        colour=None if colour is None else str(colour),
        backward=node.flag("isBackwardNode", default=False),
    )


_OPERATOR = ("name", "times", "transfers", "size", "colour", "backward")
_KIND = ("kind", "count", "memory", "concurrent")


def _read_own(top: Fields) -> Workload:
    if top.text("format") != _FORMAT:
        top.refuse("format", f"{top.table['format']!r} is not {_FORMAT!r}")
    version = top.integer("format_version")
    if version != FORMAT_VERSION:
        top.refuse("format_version", f"{version} is not {FORMAT_VERSION}, which this cutset reads")
    top.only(("format", "format_version", "devices", "colours", "operators", "edges"))
    kinds = _own_kinds(top)
    colours = frozenset(top.texts("colours", default=()))
    entries = top.objects("operators", name_field="name")
    position: dict[str, int] = {}
    for number, entry in enumerate(entries):
        name = entry.text("name")
        if name in position:
            entry.refuse("name", f"two operators are called {name!r}")
        position[name] = number
    edges = _own_edges(top, position)
    producing = {producer for producer, _ in edges}
    names = tuple(kind.name for kind in kinds)
    operators = tuple(
        _own_operator(entry, names, colours, number in producing)
        for number, entry in enumerate(entries)
    )
    return _build(top.source, kinds, operators, edges)


def _own_kinds(top: Fields) -> tuple[DeviceKind, ...]:
    entries = top.objects("devices", name_field="kind")
    if not entries:
        top.refuse("devices", "there is no device to place operators on")
    kinds: dict[str, DeviceKind] = {}
    for entry in entries:
        kind = _own_kind(entry)
        if kind.name in kinds:
            entry.refuse("kind", f"two kinds of device are called {kind.name!r}")
        kinds[kind.name] = kind
    return tuple(kinds.values())


def _own_kind(entry: Fields) -> DeviceKind:
    entry.only(_KIND)
    memory = None if entry.table.get("memory") is None else entry.amount("memory")
    return DeviceKind(
        name=entry.text("kind"),
        count=entry.count("count", _MOST_DEVICES),
        memory=memory,
        concurrent=entry.flag("concurrent", default=False),
    )


def _own_edges(top: Fields, position: dict[str, int]) -> tuple[tuple[int, int], ...]:
    edges: dict[tuple[int, int], None] = {}
    for number, pair in enumerate(top.items("edges")):
        if not (isinstance(pair, list) and len(pair) == 2 and all(type(e) is str for e in pair)):
            top.refuse(f"edges[{number}]", "an edge is a pair of names: [producer, consumer]")
        for end in pair:
            if end not in position:
                top.refuse(f"edges[{number}]", f"no operator is called {end!r}")
        edge = (position[pair[0]], position[pair[1]])
        if edge in edges:
            top.refuse(f"edges[{number}]", f"the edge {pair[0]!r} -> {pair[1]!r} is given twice")
        edges[edge] = None
    return tuple(edges)


def _own_operator(
    entry: Fields, kinds: tuple[str, ...], colours: frozenset[str], producing: bool
) -> Operator:
    entry.only(_OPERATOR)
    times = entry.inner("times")
    times.only(kinds)
    colour = None if entry.table.get("colour") is None else entry.text("colour")
    if colour is not None and colour not in colours:
        entry.refuse("colour", f"the colour {colour!r} is not in the list colours")
    transfers = (0.0,) * len(kinds)
    if producing or "transfers" in entry.table:
        moves = entry.inner("transfers")
        moves.only(kinds)
        transfers = tuple(moves.amount(kind) for kind in kinds)
    return Operator(
        name=entry.text("name"),
        times=tuple(times.amount_or_null(kind) for kind in kinds),
        transfers=transfers,
        size=entry.amount("size", default=0.0),
        colour=colour,
        backward=entry.flag("backward", default=False),
    )


def workload_to_json(workload: Workload) -> str:
    """The content of a workload file in our format; equal workloads give equal bytes."""
    names = [kind.name for kind in workload.kinds]
    document = {
        "format": _FORMAT,
        "format_version": FORMAT_VERSION,
        "devices": [
            {"kind": k.name, "count": k.count, "memory": k.memory, "concurrent": k.concurrent}
            for k in workload.kinds
        ],
        "colours": sorted({o.colour for o in workload.operators if o.colour is not None}),
        "operators": [_operator_json(operator, names) for operator in workload.operators],
        "edges": [[workload.operators[end].name for end in edge] for edge in workload.edges],
    }
    return json.dumps(document, indent=1, allow_nan=False) + "\n"


def _operator_json(operator: Operator, kinds: Sequence[str]) -> dict[str, Any]:
    return {
        "name": operator.name,
        "times": dict(zip(kinds, operator.times, strict=True)),
        "transfers": dict(zip(kinds, operator.transfers, strict=True)),
        "size": operator.size,
        "colour": operator.colour,
        "backward": operator.backward,
    }


def save_workload(workload: Workload, path: str | os.PathLike[str]) -> None:
    """Write a workload file in our format at once."""
    write_whole(Path(path), workload_to_json(workload), "workload")


def placement_to_json(
    file: WorkloadFile,
    objective: Objective,
    placement: Placement,
    pieces: Sequence[Sequence[int]] | None = None,
) -> str:
    """The content of a placement file: the device of every operator, by name.

    Args:
        pieces: operators that run together, in the order in which devices take them up, where a
            device may run several pieces (see `piece_latency`).
    """
    names = [operator.name for operator in file.workload.operators]
    first = file.first_device(objective)
    document: dict[str, Any] = {
        "format": "cutset-placement",
        "objective": objective,
        "placement": {name: first + d for name, d in zip(names, placement, strict=True)},
    }
    if pieces is not None:
        document["pieces"] = [
            {"device": first + placement[piece[0]], "operators": [names[v] for v in piece]}
            for piece in pieces
        ]
    return json.dumps(document, indent=1) + "\n"


def save_placement(text: str, path: str | os.PathLike[str]) -> None:
    """Write what `placement_to_json` gave at once.

    Raises:
        UsageError: the file cannot be written.
    """
    write_whole(Path(path), text, "placement")


def workload_schema() -> dict[str, Any]:
    """The JSON Schema of workload files in our format."""
    schemas = importlib.resources.files(__package__).joinpath("schemas")
    schema = json.loads(schemas.joinpath("workload.schema.json").read_text(encoding="utf-8"))
    assert isinstance(schema, dict)
    return schema
