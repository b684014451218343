"""Print a cluster as the text of a cluster file, TOML or JSON; `cluster_file.py` reads it back."""

from __future__ import annotations

import json

from ..compiler.ir.cluster import Cluster, DeviceType, Link, LinkRule, RateCurve
from ..compiler.ir.errors import ClusterError

__all__ = ["render_cluster"]


def render_cluster(cluster: Cluster, *, format: str = "toml") -> str:
    """`cluster` as the text of a file. `parse_cluster` is its inverse."""
    if format not in ("toml", "json"):
        raise ClusterError(
            f"a cluster file is .toml or .json, not {format!r}", ways_out=("rename the file",)
        )
    types = {entry.name: _render_type(entry) for entry in cluster.types}
    groups = _device_groups(cluster)
    links = [_render_link(rule) for rule in cluster.links]
    if format == "json":
        table = {
            "name": cluster.name,
            "local": cluster.local,
            "types": types,
            "devices": groups,
            "links": links,
        }
        return json.dumps(table, indent=2) + "\n"
    lines = [f"name = {_quoted(cluster.name)}", f"local = {json.dumps(cluster.local)}"]
    for name, body in types.items():
        lines += ["", f"[types.{_quoted(name)}]", *_toml_lines(body)]
    for title, bodies in (("devices", groups), ("links", links)):
        for body in bodies:
            lines += ["", f"[[{title}]]", *_toml_lines(body)]
    return "\n".join(lines) + "\n"


def _render_type(entry: DeviceType) -> dict[str, object]:
    body: dict[str, object] = {
        "backend": entry.backend,
        "memory": f"{entry.memory_bytes} B",
        "memory_bandwidth": f"{entry.memory_bytes_per_second!r} B/s",
        "overhead": f"{entry.overhead_seconds!r} s",
        "rates": {dtype: f"{rate!r} FLOP/s" for dtype, rate in entry.flops_per_second},
        "unsupported_ops": list(entry.unsupported_ops),
    }
    if entry.threads is not None:
        body["threads"] = entry.threads
    if entry.instruction_seconds:
        body["instruction"] = f"{entry.instruction_seconds!r} s"
    for kind, key in (("matmul", "matmul_rates"), ("attention", "attention_rates")):
        by_dtype = {c.dtype: _points(c, "FLOP") for c in entry.curves if c.kind == kind}
        if by_dtype:
            body[key] = by_dtype
    if (memory := entry.curve("memory")) is not None:
        body["memory_bandwidths"] = _points(memory, "B")
    if entry.op_costs:
        body["op_costs"] = {
            cost.name: {
                "passes": cost.passes,
                "kernels": cost.kernels,
                "backward_passes": cost.backward_passes,
                "backward_kernels": cost.backward_kernels,
            }
            for cost in entry.op_costs
        }
    if entry.host is not None:
        body["host"] = {
            **_render_path(entry.host.link),
            "memory": f"{entry.host.memory_bytes} B",
            "memory_bandwidth": f"{entry.host.memory_bytes_per_second!r} B/s",
        }
    return body


def _points(curve: RateCurve, unit: str) -> list[object]:
    return [[f"{size!r} {unit}", f"{rate!r} {unit}/s"] for size, rate in curve.points]


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
    return body | {name: _render_path(own) for name, own in rule.collectives}


def _render_path(link: Link) -> dict[str, object]:
    return {
        "latency": f"{link.latency_seconds!r} s",
        "bandwidth": f"{link.bytes_per_second!r} B/s",
    }


def _toml_lines(body: dict[str, object]) -> list[str]:
    return [f"{key} = {_toml_value(value)}" for key, value in body.items()]


def _toml_value(value: object) -> str:
    if isinstance(value, dict):
        items = (f"{_quoted(key)} = {_toml_value(item)}" for key, item in value.items())
        return "{ " + ", ".join(items) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    return _quoted(value) if isinstance(value, str) else json.dumps(value)


def _quoted(text: str) -> str:
    """A TOML basic string: JSON's, but for characters beyond the BMP, which JSON splits in two."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
