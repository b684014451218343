"""Cluster files: a cluster as TOML or JSON that a person writes and checks.

Quantities are strings with a unit, because a bare number is where cluster descriptions go wrong:

    memory              B, KB, MB, GB, TB (powers of 1000), KiB, MiB, GiB, TiB (powers of 1024)
    bandwidths          any of these per second: "3.35 TB/s", "50 GB/s", "46 GiB/s"
    latency, overhead   s, ms, us, ns
    rates               FLOP/s, GFLOP/s, TFLOP/s, PFLOP/s (a multiply-add counts as two)

    name = "two-boxes"

    [types.h100]
    backend = "cuda"
    memory = "75 GiB"
    memory_bandwidth = "2.8 TB/s"
    overhead = "5 us"
    rates = { bf16 = "650 TFLOP/s", f32 = "50 TFLOP/s" }
    host = { latency = "10 us", bandwidth = "45 GB/s", memory = "200 GiB",
             memory_bandwidth = "50 GB/s" }    # one line; optional: a device's share of its host
    unsupported_ops = ["aten.sort.default"]    # optional: operators that it cannot run

    [types.big-worker]
    backend = "cpu"
    threads = 4    # optional: of a worker on this machine; default: an equal share of its cores
    # memory, memory_bandwidth and rates as above

    [[devices]]
    type = "h100"
    node = "box0"
    count = 8

    [[links]]
    same_node = true
    latency = "8 us"
    bandwidth = "350 GB/s"

Links are rules, the first that matches a pair of devices counts; `a` and `b` name nodes. JSON has
the same keys. A file that breaks a rule is refused with the line, the reason and the remedy.
"""

from __future__ import annotations

import json
import math
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ..compiler.ir.cluster import Cluster, Device, DeviceType, Host, Link, LinkRule
from ..compiler.ir.errors import ClusterError
from ..compiler.ir.types import DTYPES_BY_NAME
from .cluster_text import render_cluster

_T = TypeVar("_T")

__all__ = ["parse_cluster", "read_cluster", "write_cluster"]

_BYTES: dict[str, float] = {
    **{f"{prefix}B": 1000.0**power for power, prefix in enumerate(("", "K", "M", "G", "T"))},
    **{f"{prefix}iB": 1024.0**power for power, prefix in enumerate(("K", "M", "G", "T"), 1)},
}
_BANDWIDTHS = {f"{unit}/s": factor for unit, factor in _BYTES.items()}
_TIMES = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
_RATES = {
    f"{prefix}FLOP/s": 1000.0**power for power, prefix in ((0, ""), (3, "G"), (4, "T"), (5, "P"))
}
_BACKENDS = ("cpu", "cuda", "tpu", "npu")


@dataclass(frozen=True, slots=True)
class _Source:
    """Text of a cluster file, to find the line of a mistake in."""

    name: str
    text: str

    def where(self, *needles: str) -> str:
        """`name:line` of the last of `needles` found, each searched after the one before it."""
        position = -1
        for needle in needles:
            found = self.text.find(needle, max(position, 0))
            position = found if found >= 0 else position
        if position < 0:
            return self.name
        return f"{self.name}:{self.text.count(chr(10), 0, position) + 1}"


def read_cluster(path: str | Path) -> Cluster:
    """The cluster that the `.toml` or `.json` file at `path` describes.

    Raises:
        ClusterError: no such file, not TOML / JSON, or a rule of the format is broken.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ClusterError(
            f"cannot read cluster file {path}: {error}",
            ways_out=("check the path", "name a preset instead, for example h100-node"),
        ) from error
    return parse_cluster(text, name=str(path), format=path.suffix.removeprefix("."))


def parse_cluster(text: str, *, name: str = "cluster", format: str = "toml") -> Cluster:
    """The cluster described by `text` in `format` (`toml` or `json`); `name` is for messages."""
    source = _Source(name, text)
    if format not in ("toml", "json"):
        raise ClusterError(
            f"a cluster file is .toml or .json, not {format!r}", ways_out=("rename the file",)
        )
    try:
        table = tomllib.loads(text) if format == "toml" else json.loads(text)
    except ValueError as error:
        raise ClusterError(
            f"not {format.upper()}: {error}", where=name, ways_out=("mend the file at that place",)
        ) from error
    if not isinstance(table, dict):
        raise ClusterError(
            "the file is not a table of keys", where=name, ways_out=(_KEYS_HELP["cluster"],)
        )
    return _cluster(table, source)


_KEYS: dict[str, tuple[str, ...]] = {
    "cluster": ("name", "local", "types", "devices", "links"),
    "type": (
        "backend",
        "memory",
        "memory_bandwidth",
        "overhead",
        "rates",
        "unsupported_ops",
        "host",
        "threads",
    ),
    "host": ("latency", "bandwidth", "memory", "memory_bandwidth"),
    "device": ("type", "node", "count"),
    "link": ("a", "b", "same_node", "latency", "bandwidth"),
}
_KEYS_HELP = {level: f"keys of a {level}: {', '.join(keys)}" for level, keys in _KEYS.items()}


def _cluster(table: dict[str, object], source: _Source) -> Cluster:
    _check_keys(table, "cluster", source, ())
    raw_types = _typed(table, "types", dict, source, ())
    types = tuple(_device_type(name, body, source) for name, body in raw_types.items())
    names = tuple(entry.name for entry in types)
    devices: list[Device] = []
    for body in _typed(table, "devices", list, source, ()):
        for kind, node in _devices(body, names, source):
            devices.append(Device(len(devices), kind, node))
    if not devices:
        raise ClusterError(
            "the cluster has no devices",
            where=source.where("devices"),
            ways_out=("add [[devices]] with type, node and count",),
        )
    nodes = tuple(dict.fromkeys(device.node for device in devices))
    links = tuple(_link(body, nodes, source) for body in _typed(table, "links", list, source, ()))
    local = table.get("local", False)
    if not isinstance(local, bool):
        raise ClusterError("local is true or false", where=source.where("local"))
    title = table.get("name", Path(source.name).stem)
    cluster = Cluster(str(title), types, tuple(devices), links, local)
    _check_links(cluster, source)
    return cluster


def _device_type(name: str, body: object, source: _Source) -> DeviceType:
    table = _as_table(body, f"types.{name}", source)
    place = (name,)
    _check_keys(table, "type", source, place)
    backend = _typed(table, "backend", str, source, place)
    if backend not in _BACKENDS:
        raise ClusterError(
            f"unknown backend {backend!r} of device type {name!r}",
            where=source.where(name, "backend"),
            ways_out=(f"one of: {', '.join(_BACKENDS)}",),
        )
    unsupported = table.get("unsupported_ops", [])
    if not isinstance(unsupported, list) or not all(isinstance(op, str) for op in unsupported):
        raise ClusterError(
            "unsupported_ops is a list of op names", where=source.where(name, "unsupported_ops")
        )
    return DeviceType(
        name=name,
        backend=backend,
        memory_bytes=int(_quantity(table, "memory", _BYTES, source, place)),
        memory_bytes_per_second=_quantity(table, "memory_bandwidth", _BANDWIDTHS, source, place),
        flops_per_second=_rates(table, name, source),
        overhead_seconds=(
            _quantity(table, "overhead", _TIMES, source, place, allow_zero=True)
            if "overhead" in table
            else 0.0
        ),
        unsupported_ops=tuple(unsupported),
        host=_host(table, name, source),
        threads=_threads(table, name, source),
    )


def _threads(table: dict[str, object], name: str, source: _Source) -> int | None:
    if "threads" not in table:
        return None
    threads = table["threads"]
    if not isinstance(threads, int) or isinstance(threads, bool) or threads < 1:
        raise ClusterError(
            f"threads = {threads!r} is not a number of threads",
            where=source.where(name, "threads"),
            ways_out=("give a whole number of at least 1", "leave the key out"),
        )
    if table["backend"] != "cpu":
        raise ClusterError(
            f"device type {name!r} has threads, but only CPU workers are given some",
            where=source.where(name, "threads"),
            ways_out=("leave the key out",),
        )
    return threads


def _host(table: dict[str, object], name: str, source: _Source) -> Host | None:
    if "host" not in table:
        return None
    body = _as_table(table["host"], f"host of {name}", source)
    place = (name, "host")
    _check_keys(body, "host", source, place)
    if table["backend"] == "cpu":
        raise ClusterError(
            f"device type {name!r} has a host, but a CPU is its own",
            where=source.where(*place),
            ways_out=("leave the key out",),
        )
    return Host(
        link=_link_of(body, source, place),
        memory_bytes=int(_quantity(body, "memory", _BYTES, source, place)),
        memory_bytes_per_second=_quantity(body, "memory_bandwidth", _BANDWIDTHS, source, place),
    )


def _link_of(table: dict[str, object], source: _Source, place: tuple[str, ...]) -> Link:
    return Link(
        _quantity(table, "latency", _TIMES, source, place, allow_zero=True),
        _quantity(table, "bandwidth", _BANDWIDTHS, source, place),
    )


def _rates(table: dict[str, object], name: str, source: _Source) -> tuple[tuple[str, float], ...]:
    raw_rates = _as_table(table.get("rates"), f"rates of {name}", source)
    for dtype in raw_rates:
        if dtype not in DTYPES_BY_NAME:
            raise ClusterError(
                f"unknown dtype {dtype!r} among the rates of {name!r}",
                where=source.where(name, "rates", dtype),
                ways_out=(f"one of: {', '.join(DTYPES_BY_NAME)}",),
            )
    if not raw_rates:
        raise ClusterError(
            f"device type {name!r} has no rates",
            where=source.where(name),
            ways_out=('add rates = { f32 = "50 TFLOP/s" }',),
        )
    return tuple(
        (dtype, _quantity(raw_rates, dtype, _RATES, source, (name, "rates"))) for dtype in raw_rates
    )


def _devices(body: object, types: tuple[str, ...], source: _Source) -> tuple[tuple[str, str], ...]:
    table = _as_table(body, "devices", source)
    _check_keys(table, "device", source, ("devices",))
    kind = _typed(table, "type", str, source, ("devices",))
    if kind not in types:
        raise ClusterError(
            f"unknown device type {kind!r}",
            where=source.where("devices", f'"{kind}"'),
            ways_out=(
                f"types of this file: {', '.join(types) or 'none'}",
                f"describe it under [types.{kind}]",
            ),
        )
    node = _typed(table, "node", str, source, ("devices",))
    count = table.get("count", 1)
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ClusterError(
            f"count = {count!r} is not a number of devices",
            where=source.where("devices", "count", str(count)),
            ways_out=("give a whole number of at least 1",),
        )
    return ((kind, node),) * count


def _link(body: object, nodes: tuple[str, ...], source: _Source) -> LinkRule:
    table = _as_table(body, "links", source)
    _check_keys(table, "link", source, ("links",))
    ends = []
    for key in ("a", "b"):
        end = table.get(key, "*")
        if not isinstance(end, str) or (end != "*" and end not in nodes):
            raise ClusterError(
                f"link end {key} = {end!r} is not a node",
                where=source.where("links", f'"{end}"'),
                ways_out=(f"nodes of this file: {', '.join(nodes)}", "'*' for any node"),
            )
        ends.append(end)
    same_node = table.get("same_node")
    if same_node is not None and not isinstance(same_node, bool):
        raise ClusterError(
            f"same_node = {same_node!r} is neither true nor false",
            where=source.where("links", "same_node"),
            ways_out=("leave the key out for links of both kinds",),
        )
    return LinkRule(_link_of(table, source, ("links",)), ends[0], ends[1], same_node)


def _quantity(
    table: dict[str, object],
    key: str,
    units: dict[str, float],
    source: _Source,
    place: tuple[str, ...],
    *,
    allow_zero: bool = False,
) -> float:
    """The value of `table[key]`, a string `number unit`, in base units."""
    where = source.where(*place, key)
    legal = f"write a number and one of the units {', '.join(units)}"
    if key not in table:
        raise ClusterError(
            f"{'.'.join((*place, key))} is missing", where=where, ways_out=(f"add it: {legal}",)
        )
    raw = table[key]
    where = source.where(*place, key, str(raw))
    match = re.fullmatch(r"\s*([-+]?[0-9.]+(?:[eE][-+]?\d+)?)\s*(\S*)\s*", str(raw))
    if not isinstance(raw, str) or match is None or match[2] not in units:
        raise ClusterError(
            f"{key} = {raw!r} is not a quantity of this kind", where=where, ways_out=(legal,)
        )
    try:
        value = float(match[1]) * units[match[2]]
    except ValueError as error:
        raise ClusterError(
            f"{key} = {raw!r}: {match[1]!r} is not a number", where=where, ways_out=(legal,)
        ) from error
    if value < 0 or (value == 0 and not allow_zero) or not math.isfinite(value):
        raise ClusterError(
            f"{key} = {raw!r} must be positive",
            where=where,
            ways_out=("measure it with `cutset calibrate`, or take a preset's figure",),
        )
    return value


def _as_table(body: object, title: str, source: _Source) -> dict[str, object]:
    if not isinstance(body, dict):
        raise ClusterError(
            f"{title} is not a table of keys",
            where=source.where(title.split(".")[-1]),
            ways_out=tuple(_KEYS_HELP.values()),
        )
    return body


def _typed(
    table: dict[str, object], key: str, kind: type[_T], source: _Source, place: tuple[str, ...]
) -> _T:
    value = table.get(key)
    if not isinstance(value, kind):
        reason = "is missing" if value is None else f"= {value!r} is not a {kind.__name__}"
        raise ClusterError(
            f"{'.'.join((*place, key))} {reason}",
            where=source.where(*place, key),
            ways_out=(f"add {key!r} (docs/cost-models.md shows the format)",),
        )
    return value


def _check_keys(
    table: dict[str, object], level: str, source: _Source, place: tuple[str, ...]
) -> None:
    for key in table:
        if key not in _KEYS[level]:
            raise ClusterError(
                f"unknown key {key!r}",
                where=source.where(*place, key),
                ways_out=(_KEYS_HELP[level],),
            )


def _check_links(cluster: Cluster, source: _Source) -> None:
    """Every two devices that differ must have a link (checked once per pair of nodes)."""
    representatives: dict[str, list[int]] = {}
    for device in cluster.devices:
        group = representatives.setdefault(device.node, [])
        if len(group) < 2:
            group.append(device.index)
    chosen = [index for group in representatives.values() for index in group]
    for first in chosen:
        for second in chosen:
            if first < second and not any(
                rule.matches(cluster.devices[first], cluster.devices[second])
                for rule in cluster.links
            ):
                nodes = cluster.devices[first].node, cluster.devices[second].node
                raise ClusterError(
                    f"no link between device {first} (node {nodes[0]}) and device {second} "
                    f"(node {nodes[1]})",
                    where=source.where("links"),
                    ways_out=(
                        "add a [[links]] rule that matches this pair",
                        "add one without a, b and same_node for all other pairs",
                    ),
                )


def write_cluster(cluster: Cluster, path: str | Path) -> None:
    """Write `cluster` to a `.toml` or `.json` file that `read_cluster` reads back equal."""
    path = Path(path)
    path.write_text(render_cluster(cluster, format=path.suffix.removeprefix(".")), encoding="utf-8")
