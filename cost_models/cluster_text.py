"""Print a cluster as the text of a cluster file, TOML or JSON; `cluster_file.py` reads it back."""

from __future__ import annotations

import json
import re
from decimal import Decimal
from typing import Any

from ..compiler.ir.cluster import CURVES, Cluster, DeviceType, Link, LinkRule
from ..compiler.ir.errors import ClusterError
from ..compiler.ir.types import DTYPES_BY_NAME
from .cluster_fields import BANDWIDTHS, BYTES, FLOPS, RATES, TIMES

__all__ = ["cluster_table", "render_cluster"]


def render_cluster(cluster: Cluster, *, format: str = "toml") -> str:
    """`cluster` as the text of a file. `parse_cluster` is its inverse."""
    if format not in ("toml", "json"):
        raise ClusterError(
            f"a cluster file is .toml or .json, not {format!r}", ways_out=("rename the file",)
        )
    if format == "json":
        return json.dumps(cluster_table(cluster), indent=2) + "\n"
    lines = [f"name = {_quoted(cluster.name)}", f"local = {json.dumps(cluster.local)}"]
    for entry in cluster.types:
        body = _render_type(entry)
        costs = body.pop("op_costs", {})
        lines += ["", f"[types.{_key(entry.name)}]", *_toml_lines(body)]
        assert isinstance(costs, dict)
        for name, phases in costs.items():
            head = f"types.{_key(entry.name)}.op_costs.{_key(name)}"
            others = {dtype: phases.pop(dtype) for dtype in DTYPES_BY_NAME if dtype in phases}
            if phases:
                lines += ["", f"[{head}]", *_toml_lines(phases)]
            for dtype, own in others.items():
                lines += ["", f"[{head}.{dtype}]", *_toml_lines(own)]
    for title, bodies in (
        ("devices", _device_groups(cluster)),
        ("links", [_render_link(rule) for rule in cluster.links]),
    ):
        for body in bodies:
            lines += ["", f"[[{title}]]", *_toml_lines(body)]
    return "\n".join(lines) + "\n"


def cluster_table(cluster: Cluster) -> dict[str, object]:
    """`cluster` as the value that its JSON file holds."""
    return {
        "name": cluster.name,
        "local": cluster.local,
        "types": {entry.name: _render_type(entry) for entry in cluster.types},
        "devices": _device_groups(cluster),
        "links": [_render_link(rule) for rule in cluster.links],
    }


def _render_type(entry: DeviceType) -> dict[str, object]:
    body: dict[str, object] = {
        "backend": entry.backend,
        "memory": _with_unit(entry.memory_bytes, BYTES),
        "memory_bandwidth": _with_unit(entry.memory_bytes_per_second, BANDWIDTHS),
        "overhead": _with_unit(entry.overhead_seconds, TIMES),
        "rates": {dtype: _with_unit(rate, RATES) for dtype, rate in entry.flops_per_second},
        "unsupported_ops": list(entry.unsupported_ops),
    }
    if entry.threads is not None:
        body["threads"] = entry.threads
    if entry.cores is not None:
        body["cores"] = entry.cores
    if entry.instruction_seconds:
        body["instruction"] = _with_unit(entry.instruction_seconds, TIMES)
    if entry.message_seconds:
        body["message"] = _with_unit(entry.message_seconds, TIMES)
    for kind in CURVES[:-1]:
        by_dtype = {c.dtype: _points(c.points, FLOPS) for c in entry.curves if c.kind == kind}
        if by_dtype:
            body[f"{kind}_rates"] = by_dtype
    if (memory := entry.curve("memory")) is not None:
        body["memory_bandwidths"] = _points(memory.points, BYTES)
    if entry.op_costs:
        body["op_costs"] = _op_costs(entry)
    if entry.host is not None:
        body["host"] = {
            **_render_path(entry.host.link),
            "memory": _with_unit(entry.host.memory_bytes, BYTES),
            "memory_bandwidth": _with_unit(entry.host.memory_bytes_per_second, BANDWIDTHS),
        }
    return body


def _op_costs(entry: DeviceType) -> dict[str, object]:
    """By name, then by phase; what is of an element type is in a table of its own among these."""
    table: dict[str, dict[str, Any]] = {}
    for cost in entry.op_costs:
        figures: dict[str, object] = {"kernels": cost.kernels}
        if cost.points:
            figures["rates"] = _points(cost.points, BYTES)
        phases = table.setdefault(cost.name, {})
        (phases.setdefault(cost.dtype, {}) if cost.dtype else phases)[cost.phase] = figures
    return dict(table)


def _points(points: tuple[tuple[float, float], ...], units: dict[str, float]) -> list[object]:
    rates = {f"{unit}/s": factor for unit, factor in units.items()}
    return [[_with_unit(size, units), _with_unit(rate, rates)] for size, rate in points]


def _with_unit(value: float, units: dict[str, float]) -> str:
    """`value` in the unit that says it shortest, if one says exactly as much; as long, the largest
    one."""
    exact = []
    for unit, factor in units.items():
        number = f"{value / factor:.6g}"
        if float(Decimal(number) * Decimal(str(factor))) == value:
            exact.append((len(number) + len(unit), -factor, f"{number} {unit}"))
    base = next(unit for unit, factor in units.items() if factor == 1.0)
    return min(exact)[2] if exact else f"{value!r} {base}"


def _device_groups(cluster: Cluster) -> list[dict[str, object]]:
    """Runs of devices of one type on one node."""
    runs: list[tuple[str, str, int]] = []
    for device in cluster.devices:
        if runs and runs[-1][:2] == (device.type, device.node):
            runs[-1] = (device.type, device.node, runs[-1][2] + 1)
        else:
            runs.append((device.type, device.node, 1))
    return [{"type": kind, "node": node, "count": count} for kind, node, count in runs]


def _render_link(rule: LinkRule) -> dict[str, object]:
    body: dict[str, object] = {"a": rule.a, "b": rule.b}
    if rule.same_node is not None:
        body["same_node"] = rule.same_node
    body |= _render_path(rule.link)
    if rule.streams is not None:
        body["streams"] = rule.streams
    if rule.compute_share:
        body["compute_share"] = rule.compute_share
    if rule.progress_share != 1.0:
        body["progress_share"] = rule.progress_share
    if rule.skew_seconds:
        body["skew"] = _with_unit(rule.skew_seconds, TIMES)
    body |= {name: _render_path(own) for name, own in rule.collectives}
    if rule.handling:
        body["handling"] = {name: _render_path(own) for name, own in rule.handling}
    return body


def _render_path(link: Link) -> dict[str, object]:
    return {
        "latency": _with_unit(link.latency_seconds, TIMES),
        "bandwidth": _with_unit(link.bytes_per_second, BANDWIDTHS),
    }


def _toml_lines(body: dict[str, object]) -> list[str]:
    return [f"{key} = {_toml_value(value)}" for key, value in body.items()]


def _toml_value(value: object) -> str:
    if isinstance(value, dict):
        items = (f"{_key(key)} = {_toml_value(item)}" for key, item in value.items())
        return "{ " + ", ".join(items) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    return _quoted(value) if isinstance(value, str) else json.dumps(value)


def _key(text: str) -> str:
    return text if re.fullmatch("[A-Za-z0-9_-]+", text) else _quoted(text)


def _quoted(text: str) -> str:
    """A TOML basic string: JSON's, but for characters beyond the BMP, which JSON splits in two."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
