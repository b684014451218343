"""Cluster files: a cluster as TOML or JSON that a person writes and checks.

Quantities are strings with a unit, because a bare number is where cluster descriptions go wrong:

    memory              B, KB, MB, GB, TB (powers of 1000), KiB, MiB, GiB, TiB (powers of 1024)
    bandwidths          any of these per second: "3.35 TB/s", "50 GB/s", "46 GiB/s"
    latency, overhead   s, ms, us, ns
    rates               FLOP/s, MFLOP/s, GFLOP/s, TFLOP/s, PFLOP/s (a multiply-add counts as two)

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
    cores = 8      # optional: that all workers of a node share, if these are fewer than threads
    # memory, memory_bandwidth and rates as above

    [[devices]]
    type = "h100"
    node = "box0"
    count = 8

    [[links]]
    same_node = true
    latency = "8 us"
    bandwidth = "350 GB/s"

What `cutset calibrate` measures besides, all optional:

    [types.h100]
    instruction = "40 us"    # of the host, for one instruction of a program beside its kernels
    message = "90 us"        # of a CPU worker, for asking for a message, beside that and its bytes
    matmul_rates = { f32 = [["1 MFLOP", "20 GFLOP/s"], ["1 GFLOP", "60 GFLOP/s"]] }
    attention_rates = { f32 = [["1 MFLOP", "9 GFLOP/s"]] }
    memory_bandwidths = [["64 KiB", "20 GB/s"], ["64 MiB", "8 GB/s"]]
    [types.h100.op_costs.gelu]    # by operator or category
    forward = { kernels = 1.0, rates = [["64 KiB", "4 GB/s"], ["64 MiB", "3 GB/s"]] }
    # backward_input, backward_weight likewise; kernels count the overhead
    [types.h100.op_costs.gelu.bf16]    # in this element type; others take the above
    forward = { kernels = 1.0, rates = [["64 KiB", "2 GB/s"]] }

    [[links]]
    streams = 1.5            # messages of one node that go at once at full bandwidth
    compute_share = 0.3      # of a device's rate that a transfer at full speed takes away
    progress_share = 0.5     # of its speed, what a transfer keeps beside computation
    skew = "200 us"          # how much later than the mean the last rank reaches a collective
    all_reduce = { latency = "90 us", bandwidth = "3 GB/s" }    # of one ring step
    # all_gather, reduce_scatter, all_to_all likewise
    # what those of a stage take of the computation beside which they travel; reduce_scatter too
    handling = { all_gather = { latency = "450 us", bandwidth = "1 GB/s" } }

Links are rules, the first that matches a pair of devices counts; `a` and `b` name nodes. JSON has
the same keys. A file that breaks a rule is refused with the line, the reason and the remedy.
"""

from __future__ import annotations

import tomllib
from pathlib import Path

from ..compiler.files import write_whole
from ..compiler.ir.cluster import Cluster, Device, DeviceType, Host, LinkRule
from ..compiler.ir.errors import ClusterError
from ..compiler.json_fields import strict_json
from .cluster_fields import (
    BANDWIDTHS,
    KEYS_HELP,
    RATES,
    TIMES,
    Source,
    as_table,
    check_keys,
    number,
    quantity,
    typed,
    whole_bytes,
)
from .cluster_measured import (
    check_dtype,
    collective_links,
    curves,
    handling_links,
    link_of,
    op_costs,
)
from .cluster_text import render_cluster

__all__ = ["MOST_DEVICES", "parse_cluster", "read_cluster", "write_cluster"]

_BACKENDS = ("cpu", "cuda", "tpu", "npu")
MOST_DEVICES = 1 << 16
"""What a cluster may have, however it is named."""


def read_cluster(path: str | Path) -> Cluster:
    """The cluster that the `.toml` or `.json` file at `path` describes.

    Raises:
        ClusterError: no such file, not TOML / JSON, or a rule of the format is broken.
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ClusterError(
            f"cannot read the cluster file: {reason}",
            where=str(path),
            ways_out=(
                "check the path and its permissions",
                "name a preset instead, for example h100-node",
            ),
        ) from error
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ClusterError(
            f"the cluster file is no text in UTF-8: {error.reason}",
            where=f"{path}:{raw.count(bytes([10]), 0, error.start) + 1}",
            ways_out=("save it as UTF-8", "name a preset instead, for example h100-node"),
        ) from error
    return parse_cluster(text, name=str(path), format=path.suffix.removeprefix(".").lower())


def parse_cluster(text: str, *, name: str = "cluster", format: str = "toml") -> Cluster:
    """The cluster described by `text` in `format` (`toml` or `json`); `name` is for messages."""
    source = Source.of(name, text, format)
    if format not in ("toml", "json"):
        raise ClusterError(
            f"a cluster file is .toml or .json, not {format!r}", ways_out=("rename the file",)
        )
    try:
        table = tomllib.loads(text) if format == "toml" else strict_json(text)
    except (ValueError, RecursionError) as error:
        too_deep = isinstance(error, RecursionError)
        raise ClusterError(
            f"not {format.upper()}: {'it is nested too deeply' if too_deep else error}",
            where=source.at_error(error),
            ways_out=("mend the file at that place",),
        ) from error
    if not isinstance(table, dict):
        raise ClusterError(
            "the file is not a table of keys", where=name, ways_out=(KEYS_HELP["cluster"],)
        )
    return _cluster(table, source)


def _cluster(table: dict[str, object], source: Source) -> Cluster:
    check_keys(table, "cluster", source, ())
    title = typed(table, "name", str, source, ()) if "name" in table else Path(source.name).stem
    raw_types = typed(table, "types", dict, source, ())
    types = tuple(_device_type(name, body, source) for name, body in raw_types.items())
    names = tuple(entry.name for entry in types)
    devices: list[Device] = []
    for index, body in enumerate(typed(table, "devices", list, source, ())):
        kind, node, count = _devices(body, names, source.entry("devices", index), len(devices))
        first = len(devices)
        devices += [Device(number, kind, node) for number in range(first, first + count)]
    if not devices:
        raise ClusterError(
            "the cluster has no devices",
            where=source.where("devices"),
            ways_out=("add [[devices]] with type, node and count",),
        )
    nodes = tuple(dict.fromkeys(device.node for device in devices))
    links = tuple(
        _link(body, nodes, source.entry("links", index))
        for index, body in enumerate(
            typed(table, "links", list, source, ()) if "links" in table else ()
        )
    )
    local = table.get("local", False)
    if not isinstance(local, bool):
        raise ClusterError(
            f"local = {local!r} is neither true nor false",
            where=source.where("local"),
            ways_out=("write local = true if the devices are those of this machine",),
        )
    cluster = Cluster(title, types, tuple(devices), links, local)
    _check_links(cluster, source)
    return cluster


def _device_type(name: str, body: object, source: Source) -> DeviceType:
    place = (name,)
    if not name:
        raise ClusterError(
            "a device type has no name",
            where=source.where("types"),
            ways_out=("name it, for example [types.h100]",),
        )
    table = as_table(body, "type", source, place)
    check_keys(table, "type", source, place)
    backend = typed(table, "backend", str, source, place)
    if backend not in _BACKENDS:
        raise ClusterError(
            f"unknown backend {backend!r} of device type {name!r}",
            where=source.where(name, "backend"),
            ways_out=(f"one of: {', '.join(_BACKENDS)}",),
        )
    unsupported = table.get("unsupported_ops", [])
    if not isinstance(unsupported, list) or not all(isinstance(op, str) for op in unsupported):
        raise ClusterError(
            f"unsupported_ops = {unsupported!r} is not a list of operator names",
            where=source.where(name, "unsupported_ops"),
            ways_out=('write for example ["aten.sort.default"]', "leave the key out"),
        )
    return DeviceType(
        name=name,
        backend=backend,
        memory_bytes=whole_bytes(table, "memory", source, place),
        memory_bytes_per_second=quantity(table, "memory_bandwidth", BANDWIDTHS, source, place),
        flops_per_second=_rates(table, name, source),
        overhead_seconds=_seconds(table, "overhead", name, source),
        unsupported_ops=tuple(unsupported),
        host=_host(table, name, source),
        threads=_of_workers(table, "threads", name, source),
        cores=_of_workers(table, "cores", name, source),
        instruction_seconds=_seconds(table, "instruction", name, source),
        message_seconds=_seconds(table, "message", name, source),
        curves=curves(table, name, source),
        op_costs=op_costs(table, name, source),
    )


def _seconds(table: dict[str, object], key: str, name: str, source: Source) -> float:
    """What `key` of type `name` says, nothing by default."""
    if key not in table:
        return 0.0
    if key == "message" and table["backend"] != "cpu":
        raise ClusterError(
            f"device type {name!r} has message, but only CPU workers ask for messages themselves",
            where=source.where(name, key),
            ways_out=("leave the key out",),
        )
    return quantity(table, key, TIMES, source, (name,), allow_zero=True)


def _of_workers(table: dict[str, object], key: str, name: str, source: Source) -> int | None:
    """How many `threads` or `cores` CPU workers of type `name` have, if it is said."""
    if key not in table:
        return None
    number = table[key]
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise ClusterError(
            f"{key} = {number!r} is not a number of {key}",
            where=source.where(name, key),
            ways_out=("give a whole number of at least 1", "leave the key out"),
        )
    if table["backend"] != "cpu":
        raise ClusterError(
            f"device type {name!r} has {key}, but only CPU workers are given some",
            where=source.where(name, key),
            ways_out=("leave the key out",),
        )
    return number


def _host(table: dict[str, object], name: str, source: Source) -> Host | None:
    if "host" not in table:
        return None
    place = (name, "host")
    body = as_table(table["host"], "host", source, place)
    check_keys(body, "host", source, place)
    if table["backend"] == "cpu":
        raise ClusterError(
            f"device type {name!r} has a host, but a CPU is its own",
            where=source.where(*place),
            ways_out=("leave the key out",),
        )
    return Host(
        link=link_of(body, source, place),
        memory_bytes=whole_bytes(body, "memory", source, place),
        memory_bytes_per_second=quantity(body, "memory_bandwidth", BANDWIDTHS, source, place),
    )


def _rates(table: dict[str, object], name: str, source: Source) -> tuple[tuple[str, float], ...]:
    raw_rates = table.get("rates")
    if not isinstance(raw_rates, dict) or not raw_rates:
        raise ClusterError(
            f"device type {name!r} has no rates",
            where=source.where(name, "rates"),
            ways_out=('add rates = { f32 = "50 TFLOP/s" }',),
        )
    for dtype in raw_rates:
        check_dtype(dtype, f"rates of {name!r}", source, (name, "rates"))
    return tuple(
        (dtype, quantity(raw_rates, dtype, RATES, source, (name, "rates"))) for dtype in raw_rates
    )


def _devices(
    body: object, types: tuple[str, ...], source: Source, before: int
) -> tuple[str, str, int]:
    """Type, node and count of an entry that follows `before` devices."""
    table = as_table(body, "device", source, ("devices",))
    check_keys(table, "device", source, ("devices",))
    kind = typed(table, "type", str, source, ("devices",))
    if kind not in types:
        raise ClusterError(
            f"unknown device type {kind!r}",
            where=source.where("devices", f'"{kind}"'),
            ways_out=(
                f"types of this file: {', '.join(types) or 'none'}",
                f"describe it under [types.{kind}]",
            ),
        )
    node = typed(table, "node", str, source, ("devices",))
    if not node:
        raise ClusterError(
            "the node of the devices has no name",
            where=source.where("devices", "node"),
            ways_out=("name the machine that they are in: devices of one node share its name",),
        )
    count = table.get("count", 1)
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ClusterError(
            f"count = {count!r} is not a number of devices",
            where=source.where("devices", "count", str(count)),
            ways_out=("give a whole number of at least 1",),
        )
    if before + count > MOST_DEVICES:
        raise ClusterError(
            f"a cluster of {before + count} devices is too large",
            where=source.where("devices", "count", str(count)),
            ways_out=(f"give at most {MOST_DEVICES} devices in all",),
        )
    return kind, node, count


def _link(body: object, nodes: tuple[str, ...], source: Source) -> LinkRule:
    table = as_table(body, "link", source, ("links",))
    check_keys(table, "link", source, ("links",))
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
    place = ("links",)
    kept = _progress_share(table, source)
    return LinkRule(
        link_of(table, source, place),
        ends[0],
        ends[1],
        same_node,
        collective_links(table, source, place),
        number(table, "streams", source, place, allow_zero=False) if "streams" in table else None,
        number(table, "compute_share", source, place, below=1 / kept)
        if "compute_share" in table
        else 0.0,
        kept,
        quantity(table, "skew", TIMES, source, place, allow_zero=True) if "skew" in table else 0.0,
        handling_links(table, source, place),
    )


def _progress_share(table: dict[str, object], source: Source) -> float:
    if "progress_share" not in table:
        return 1.0
    share = number(table, "progress_share", source, ("links",), allow_zero=False)
    if share > 1.0:
        raise ClusterError(
            f"progress_share = {share:g} is more than the whole speed",
            where=source.where("links", "progress_share"),
            ways_out=("write a share above 0 and of at most 1, as 0.5",),
        )
    return share


def _check_links(cluster: Cluster, source: Source) -> None:
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
    """Write `cluster` to a `.toml` or `.json` file that `read_cluster` reads back equal.

    Raises:
        UsageError: the file cannot be written; one that was there is as it was.
    """
    path = Path(path)
    write_whole(path, render_cluster(cluster, format=path.suffix.removeprefix(".")), "cluster")
