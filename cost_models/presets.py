"""Clusters that a user can name without measuring: presets, local clusters, `--devices` values.

Rates of accelerators are *sustained* ones, a share of the peak in their data sheets, and the memory
leaves 4 to 6 GiB for the driver's context, libraries and the allocator's segments:

* a100: NVIDIA A100 80GB SXM data sheet: 312 TFLOP/s bf16, 19.5 TFLOP/s f32, 19.5 f64 on tensor
  cores, 2.04 TB/s; NVLink 600 GB/s both ways. Taken: 77 %, 87 %, 77 %, 78 %; 77 % of one way.
* h100: NVIDIA H100 SXM data sheet: 989 TFLOP/s bf16, 67 f32, 67 f64 on tensor cores, 3.35 TB/s;
  NVLink 900 GB/s both ways. Taken: 66 %, 75 %, 75 %, 84 %; 78 % of one way.
* h200: the same with 141 GB at 4.8 TB/s. Measured on one: 797 TFLOP/s bf16, 4.2 TB/s copy, 359 GB/s
  over NVLink to another. Taken: 700 TFLOP/s, 4.0 TB/s, 350 GB/s.
* InfiniBand: one HDR (200 Gb/s) or NDR (400 Gb/s) adapter a device, as DGX A100 and DGX H100 have:
  25 and 50 GB/s one way, of which 88 and 90 %.
* PCIe x16 of the fourth and fifth generation, 32 and 64 GB/s, of which 63 to 70 %, to the host.
* cpu-core: one core of a recent x86 server (AVX-512, about 160 GFLOP/s f32) running torch
  with one thread, of which 56 %; gloo over loopback between workers, measured on such a machine.
* cpu-host: two sockets of that kind; 100 Gb/s Ethernet between hosts, of which 88 %.
* Threads of CPUs: what `cutset calibrate` found on two virtual cores with a worker each (seven
  runs) and for four workers of one thread on a shared host of 16 cores (one). An instruction takes
  17 to 33 us: taken 20. A message keeps a thread busy at either end, so half as many as workers go
  at full speed (0.8 to 1.4 of two, 2.6 of four). They take 0.1 of a core from what is computed
  (12 % on the host; on two cores the figure says little, 0 to 90 %) and keep 0.2 of their speed
  beside it (2 to 39 %, on two). The last worker came to a collective 620 to 930 us late on two
  cores, not all quiet: that says more of what else ran there, and nothing of it is taken. Between
  hosts none of this was measured.
* `tpu-like` and `npu-like` are shapes of machine to plan for, not products: of the order of what is
  published of TPU v5p and Ascend 910B.

Latencies and overheads are of the order of published microbenchmarks; `cutset calibrate` measures
those of the devices at hand.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ..compiler.ir.cluster import Cluster, Device, DeviceType, Host, Link, LinkRule
from ..compiler.ir.errors import ClusterError
from .cluster_file import MOST_DEVICES, read_cluster

__all__ = [
    "device_type",
    "limit_memory",
    "local_cluster",
    "local_cpu_cluster",
    "local_cuda_cluster",
    "local_mixed_cluster",
    "make_cluster",
    "parse_devices",
    "preset",
    "preset_names",
]

GIB = 1 << 30
MICROSECOND = 1e-6
GIGA = 1e9
TERA = 1e12

# one of eight accelerators' share of two sockets, over PCIe of the fourth and fifth generation
_HOST_A100 = Host(Link(10 * MICROSECOND, 20 * GIGA), 100 * GIB, 40 * GIGA)
_HOST_H100 = Host(Link(10 * MICROSECOND, 45 * GIGA), 200 * GIB, 60 * GIGA)

_TYPES: tuple[DeviceType, ...] = (
    DeviceType(
        "a100",
        "cuda",
        75 * GIB,
        1.6 * TERA,
        (("bf16", 240 * TERA), ("f16", 240 * TERA), ("f32", 17 * TERA), ("f64", 15 * TERA)),
        6 * MICROSECOND,
        host=_HOST_A100,
    ),
    DeviceType(
        "h100",
        "cuda",
        75 * GIB,
        2.8 * TERA,
        (("bf16", 650 * TERA), ("f16", 650 * TERA), ("f32", 50 * TERA), ("f64", 50 * TERA)),
        5 * MICROSECOND,
        host=_HOST_H100,
    ),
    DeviceType(
        "h200",
        "cuda",
        134 * GIB,
        4.0 * TERA,
        (("bf16", 700 * TERA), ("f16", 700 * TERA), ("f32", 50 * TERA), ("f64", 50 * TERA)),
        5 * MICROSECOND,
        host=_HOST_H100,
    ),
    DeviceType(
        "tpu-like",
        "tpu",
        90 * GIB,
        2.3 * TERA,
        (("bf16", 350 * TERA), ("f32", 60 * TERA)),
        2 * MICROSECOND,
        ("aten.linalg_eigh.default", "aten.linalg_svd.default", "aten.nonzero.default"),
    ),
    DeviceType(
        "npu-like",
        "npu",
        60 * GIB,
        1.2 * TERA,
        (("bf16", 250 * TERA), ("f16", 280 * TERA), ("f32", 60 * TERA)),
        10 * MICROSECOND,
        ("aten.linalg_eigh.default", "aten.linalg_svd.default"),
    ),
    DeviceType(
        "cpu-core",
        "cpu",
        4 * GIB,
        10 * GIGA,
        (("f32", 90 * GIGA), ("f64", 45 * GIGA), ("bf16", 50 * GIGA), ("f16", 80 * GIGA)),
        6 * MICROSECOND,
        instruction_seconds=20 * MICROSECOND,
    ),
    DeviceType(
        "cpu-host",
        "cpu",
        480 * GIB,
        300 * GIGA,
        (("f32", 3 * TERA), ("f64", 1.5 * TERA), ("bf16", 6 * TERA)),
        10 * MICROSECOND,
        instruction_seconds=20 * MICROSECOND,
    ),
)

_OF_HOST = 0.7  # of the memory of this machine, for what is offloaded

_NVLINK_A100 = Link(8 * MICROSECOND, 230 * GIGA)
_NVLINK_H100 = Link(8 * MICROSECOND, 350 * GIGA)
_INFINIBAND_200 = Link(12 * MICROSECOND, 22 * GIGA)
_INFINIBAND_400 = Link(12 * MICROSECOND, 45 * GIGA)
_TORUS = Link(3 * MICROSECOND, 90 * GIGA)
_NPU_MESH = Link(10 * MICROSECOND, 25 * GIGA)
_PCIE = Link(12 * MICROSECOND, 22 * GIGA)
_ETHERNET_100 = Link(40 * MICROSECOND, 11 * GIGA)
_LOOPBACK = Link(120 * MICROSECOND, 2 * GIGA)

# device type -> (devices in a node, link inside a node, link between nodes)
_MACHINES: tuple[tuple[str, int, Link, Link], ...] = (
    ("a100", 8, _NVLINK_A100, _INFINIBAND_200),
    ("h100", 8, _NVLINK_H100, _INFINIBAND_400),
    ("h200", 8, _NVLINK_H100, _INFINIBAND_400),
    ("tpu-like", 4, _TORUS, _TORUS),
    ("npu-like", 8, _NPU_MESH, _INFINIBAND_200),
    ("cpu-core", 2, _LOOPBACK, _ETHERNET_100),
    ("cpu-host", 1, _LOOPBACK, _ETHERNET_100),
)

# preset -> (device type, devices)
_PRESETS: tuple[tuple[str, str, int], ...] = (
    ("a100-node", "a100", 8),
    ("h100-node", "h100", 8),
    ("h200-node", "h200", 8),
    ("a100x64", "a100", 64),
    ("h100x64", "h100", 64),
    ("h200x64", "h200", 64),
    ("tpu-like-slice", "tpu-like", 16),
    ("npu-like-node", "npu-like", 8),
    ("cpu-node", "cpu-core", 2),
    ("cpu-hosts", "cpu-host", 4),
)


def device_type(name: str) -> DeviceType:
    """The built-in device type called `name`. Raises ClusterError for an unknown one."""
    for entry in _TYPES:
        if entry.name == name:
            return entry
    raise ClusterError(
        f"unknown device type {name!r}",
        ways_out=(f"one of: {', '.join(entry.name for entry in _TYPES)}", "a cluster file"),
    )


def preset_names() -> tuple[str, ...]:
    """Names that `preset` accepts."""
    return (*(name for name, _, _ in _PRESETS), "mixed-node")


def preset(name: str) -> Cluster:
    """The built-in cluster called `name` (see `preset_names`).

    Raises:
        ClusterError: there is no such preset.
    """
    if name == "mixed-node":
        return _mixed_node()
    for entry, kind, count in _PRESETS:
        if entry == name:
            return make_cluster(kind, count, name=name)
    raise ClusterError(
        f"unknown cluster preset {name!r}",
        ways_out=(
            f"one of: {', '.join(preset_names())}",
            "a device type and a count, such as h100:64",
            "the path of a .toml or .json cluster file",
        ),
    )


def make_cluster(
    kind: str, count: int, *, devices_per_node: int | None = None, name: str | None = None
) -> Cluster:
    """`count` devices of built-in type `kind`, filled node by node.

    Args:
        kind: a device type of the table above (`h100`).
        count: number of devices, at least 1.
        devices_per_node: devices in a node; by default that of the usual machine (8 for h100).
        name: of the cluster; by default `h100x64`.

    Raises:
        ClusterError: unknown type or a count below 1.
    """
    entry = device_type(kind)
    machine = next(machine for machine in _MACHINES if machine[0] == kind)
    per_node = machine[1] if devices_per_node is None else devices_per_node
    if per_node < 1:
        raise ClusterError(
            f"a node of {per_node} devices is not possible", ways_out=("give at least 1",)
        )
    _check_count(count)
    devices = tuple(Device(index, kind, f"node{index // per_node}") for index in range(count))
    inside = _inside(kind, machine[2], min(count, per_node))
    links = (replace(inside, same_node=True), LinkRule(machine[3], same_node=False))
    return Cluster(name or f"{kind}x{count}", (entry,), devices, links)


def _check_count(count: int) -> None:
    if not 1 <= count <= MOST_DEVICES:
        raise ClusterError(
            f"{count} devices is not possible", ways_out=(f"give a count of 1 to {MOST_DEVICES}",)
        )


def _inside(kind: str, link: Link, workers: int) -> LinkRule:
    """The rule for `workers` devices of `kind` in one node; those of `cpu-core` have no threads but
    the ones that compute to carry messages."""
    if kind != "cpu-core":
        return LinkRule(link)
    return LinkRule(
        link,
        streams=max(1.0, workers / 2),
        compute_share=0.1,
        progress_share=0.2,
    )


def _mixed_node() -> Cluster:
    """Two generations of GPU (NVLink within each) and a CPU host, joined by PCIe."""
    kinds = ["h100"] * 4 + ["a100"] * 4 + ["cpu-host"]
    nodes = {"h100": "gpu-new", "a100": "gpu-old", "cpu-host": "host"}
    devices = tuple(Device(index, kind, nodes[kind]) for index, kind in enumerate(kinds))
    links = (
        LinkRule(_NVLINK_H100, "gpu-new", "gpu-new", True),
        LinkRule(_NVLINK_A100, "gpu-old", "gpu-old", True),
        LinkRule(_LOOPBACK, "host", "host", True),
        LinkRule(_PCIE),
    )
    types = tuple(device_type(kind) for kind in dict.fromkeys(kinds))
    return Cluster("mixed-node", types, devices, links)


def local_cpu_cluster(count: int, memory_limit_bytes: int | None = None) -> Cluster:
    """`count` CPU worker processes of this machine, one core each, on gloo over loopback.

    Args:
        memory_limit_bytes: what a plan may use on each; by default that of `cpu-core`.
    """
    return _local("cpu", count, _with_memory(device_type("cpu-core"), memory_limit_bytes))


def local_cuda_cluster(count: int, memory_limit_bytes: int | None = None) -> Cluster:
    """The first `count` CUDA devices of this machine, which are asked for name and memory.

    Raises:
        ClusterError: this machine has fewer.
    """
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count > available:
        raise ClusterError(
            f"{count} CUDA devices are wanted, this machine has {available}",
            ways_out=(f"use at most {available} devices", "use CPU workers: devices='cpu:N'"),
        )
    properties = torch.cuda.get_device_properties(0)
    known = [entry for entry in _TYPES if entry.backend == "cuda"]
    lowered = properties.name.lower()
    base = next((entry for entry in known if entry.name in lowered), device_type("a100"))
    limit = int(properties.total_memory * 0.95)
    if base.host is not None:
        share = _machine_memory() * _OF_HOST // available
        base = replace(base, host=replace(base.host, memory_bytes=int(share)))
    return _local("cuda", count, _with_memory(base, memory_limit_bytes or limit))


def local_mixed_cluster(kinds: Sequence[str], memory_limit_bytes: int | None = None) -> Cluster:
    """CUDA devices and CPU workers of this machine in one job, in the order of ranks.

    CPU workers share the cores and the memory of the machine; all messages but those between two
    CUDA devices are gloo over loopback.

    Args:
        kinds: `cuda` or `cpu` for each rank; the first `cuda` is device 0, and so on.

    Raises:
        ClusterError: this machine has fewer CUDA devices.
    """
    gpus = local_cuda_cluster(kinds.count("cuda"), memory_limit_bytes)
    host = replace(
        device_type("cpu-host"),
        memory_bytes=int(_machine_memory() * _OF_HOST / max(1, kinds.count("cpu"))),
    )
    types = {"cuda": gpus.types[0], "cpu": _with_memory(host, memory_limit_bytes)}
    nodes = {"cuda": "localhost", "cpu": "localhost-cpu"}
    devices = tuple(
        Device(index, types[kind].name, nodes[kind]) for index, kind in enumerate(kinds)
    )
    between_gpus = replace(gpus.links[0], a=nodes["cuda"], b=nodes["cuda"], same_node=True)
    name = f"local-cudax{kinds.count('cuda')}-cpux{kinds.count('cpu')}"
    links = (between_gpus, LinkRule(_LOOPBACK))
    return Cluster(name, tuple(types.values()), devices, links, local=True)


def _machine_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def local_cluster(count: int, memory_limit_bytes: int | None = None) -> Cluster:
    """`count` workers on this machine: CUDA if it has that many GPUs, else CPU processes."""
    if torch.cuda.is_available() and torch.cuda.device_count() >= count:
        return local_cuda_cluster(count, memory_limit_bytes)
    return local_cpu_cluster(count, memory_limit_bytes)


def _with_memory(entry: DeviceType, limit: int | None) -> DeviceType:
    return entry if limit is None else replace(entry, memory_bytes=limit)


def _local(backend: str, count: int, entry: DeviceType) -> Cluster:
    _check_count(count)
    if entry.memory_bytes < 1:
        raise ClusterError(
            f"a memory limit of {entry.memory_bytes} bytes is not possible",
            ways_out=("give a limit of at least one byte",),
        )
    devices = tuple(Device(index, entry.name, "localhost") for index in range(count))
    inner = next(machine[2] for machine in _MACHINES if machine[0] == entry.name)
    rule = _inside(entry.name, inner, count)
    return Cluster(f"local-{backend}x{count}", (entry,), devices, (rule,), local=True)


def parse_devices(
    spec: int | str | Path | Cluster | Sequence[torch.device | str],
    memory_limit_bytes: int | None = None,
) -> Cluster:
    """The cluster that a user's `devices` argument (or `--devices`) names.

    Args:
        spec: a number of local workers (`4`, `"4"`), local workers of a kind (`"cpu:4"`,
            `"cuda:2"`, `"cuda:1+cpu:2"`), a list of `torch.device`s, a preset (`"h100-node"`), a
            device type and count (`"h100:64"`), the path of a `.toml` or `.json` cluster file, or a
            `Cluster`.
        memory_limit_bytes: lowers the memory a plan may use on every device.

    Raises:
        ClusterError: none of these, or more devices than this machine has.
    """
    if isinstance(spec, Cluster):
        return limit_memory(spec, memory_limit_bytes)
    if isinstance(spec, bool) or not isinstance(spec, int | str | Path | Sequence):
        raise ClusterError(
            f"devices = {spec!r} names no devices",
            ways_out=("a count, a list of torch.device, a preset, a cluster file or a Cluster",),
        )
    if isinstance(spec, int):
        return local_cluster(spec, memory_limit_bytes)
    if isinstance(spec, str | Path):
        return _parse_text(str(spec), memory_limit_bytes)
    return _parse_list([torch.device(item) for item in spec], memory_limit_bytes)


def limit_memory(cluster: Cluster, memory_limit_bytes: int | None) -> Cluster:
    """`cluster` with every device's memory lowered to `memory_limit_bytes` (None: unchanged)."""
    if memory_limit_bytes is None:
        return cluster
    types = tuple(
        _with_memory(entry, min(entry.memory_bytes, memory_limit_bytes)) for entry in cluster.types
    )
    return Cluster(cluster.name, types, cluster.devices, cluster.links, cluster.local)


def _parse_text(spec: str, limit: int | None) -> Cluster:
    if re.fullmatch(r"[+-]?\d{1,18}", spec):
        return local_cluster(int(spec), limit)
    if spec.lower().endswith((".toml", ".json")) or os.sep in spec or os.path.isfile(spec):
        return limit_memory(read_cluster(spec), limit)
    if "+" in spec:
        return _parse_mixed(spec, limit)
    kind, colon, count = spec.partition(":")
    if not colon:
        return limit_memory(preset(spec), limit)
    if re.fullmatch(r"[1-9]\d{0,17}", count) is None:
        raise ClusterError(
            f"{count!r} in devices = {spec!r} is not a number of devices",
            ways_out=(f"write for example {kind}:4",),
        )
    if kind == "cpu":
        return local_cpu_cluster(int(count), limit)
    if kind == "cuda":
        return local_cuda_cluster(int(count), limit)
    base = next((entry[1] for entry in _PRESETS if entry[0] == kind), kind)
    return limit_memory(make_cluster(base, int(count)), limit)


def _parse_mixed(spec: str, limit: int | None) -> Cluster:
    """`cuda:1+cpu:2`: devices of this machine in the order of ranks."""
    kinds: list[str] = []
    for part in spec.split("+"):
        match = re.fullmatch(r"(cuda|cpu):([1-9]\d{0,17})", part)
        if match is None:
            raise ClusterError(
                f"{part!r} in devices = {spec!r} names no devices of this machine",
                ways_out=("write for example cuda:1+cpu:2", "describe a cluster in a file"),
            )
        _check_count(len(kinds) + int(match[2]))
        kinds += [match[1]] * int(match[2])
    if len(set(kinds)) == 1:
        return _parse_text(f"{kinds[0]}:{len(kinds)}", limit)
    return local_mixed_cluster(kinds, limit)


def _parse_list(devices: Sequence[torch.device], limit: int | None) -> Cluster:
    kinds = sorted({device.type for device in devices})
    if not kinds or not {"cpu", "cuda"}.issuperset(kinds):
        raise ClusterError(
            f"devices of kinds {kinds or 'none'} cannot form a local cluster",
            ways_out=("give devices that are cpu or cuda", "describe them in a file"),
        )
    if kinds == ["cpu"]:
        return local_cpu_cluster(len(devices), limit)
    indices = [device.index or 0 for device in devices if device.type == "cuda"]
    if sorted(indices) != list(range(len(indices))):
        raise ClusterError(
            f"CUDA devices {indices} are not 0 to {len(indices) - 1}, each once",
            ways_out=("choose devices with CUDA_VISIBLE_DEVICES and give a count",),
        )
    if len(kinds) > 1:
        if indices != sorted(indices):
            raise ClusterError(
                f"CUDA devices {indices} are not in ascending order",
                ways_out=("give them in the order of their numbers",),
            )
        return local_mixed_cluster([device.type for device in devices], limit)
    return local_cuda_cluster(len(devices), limit)
