"""A description of devices and links: what plans are made for.

Bandwidths are bytes per second in one direction, latencies and overheads seconds, memory bytes,
rates floating-point operations per second (one multiply-add counts as two).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .errors import ClusterError
from .types import dtype_name

__all__ = ["Cluster", "Device", "DeviceType", "Host", "Link", "LinkRule"]


@dataclass(frozen=True, slots=True)
class Link:
    """Latency-bandwidth (alpha-beta) model of a point-to-point path."""

    latency_seconds: float
    bytes_per_second: float

    def seconds(self, num_bytes: float) -> float:
        return self.latency_seconds + num_bytes / self.bytes_per_second


@dataclass(frozen=True, slots=True)
class Host:
    """What one accelerator has of the host that it is plugged into, when its neighbours use theirs.

    Args:
        link: between the device and the host's memory, in one direction.
        memory_bytes: memory of the host that a plan may use for this device.
        memory_bytes_per_second: sustained memory bandwidth.
    """

    link: Link
    memory_bytes: int
    memory_bytes_per_second: float


@dataclass(frozen=True, slots=True)
class DeviceType:
    """One model of device.

    Args:
        name: unique in the cluster (`h100`, `cpu-core`).
        backend: the torch device type that runs it: `cuda` or `cpu`.
        memory_bytes: memory a plan may use.
        memory_bytes_per_second: sustained memory bandwidth.
        flops_per_second: sustained matrix rate by short dtype name (`bf16`, `f32`); a dtype that
            is missing runs at the rate of `f32`.
        overhead_seconds: fixed cost of issuing one operator.
        unsupported_ops: names of ops that the device cannot run.
        host: where optimizer states can lie; None: nowhere but on the device.
        threads: compute threads of a CPU worker; None: an equal share of the cores of its machine.
    """

    name: str
    backend: str
    memory_bytes: int
    memory_bytes_per_second: float
    flops_per_second: tuple[tuple[str, float], ...]
    overhead_seconds: float = 0.0
    unsupported_ops: tuple[str, ...] = ()
    host: Host | None = None
    threads: int | None = None

    def rate(self, dtype: torch.dtype) -> float:
        """Matrix rate for `dtype` in flops per second."""
        rates = dict(self.flops_per_second)
        return rates.get(dtype_name(dtype), rates.get("f32", min(rates.values())))


@dataclass(frozen=True, slots=True)
class Device:
    """One device; its position in `Cluster.devices` is the rank that runs on it."""

    index: int
    type: str
    node: str


@dataclass(frozen=True, slots=True)
class LinkRule:
    """The link between two devices: the first rule of the cluster that matches is used.

    `a` and `b` are node names, or `*`; `same_node` True / False restricts to pairs inside one
    node / across nodes, None matches both.
    """

    link: Link
    a: str = "*"
    b: str = "*"
    same_node: bool | None = None

    def matches(self, source: Device, target: Device) -> bool:
        if self.same_node is not None and self.same_node != (source.node == target.node):
            return False
        return any(
            self.a in ("*", first.node) and self.b in ("*", second.node)
            for first, second in ((source, target), (target, source))
        )


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Cluster:
    """Devices and links. `local` says that the devices are those of this machine (can be run)."""

    name: str
    types: tuple[DeviceType, ...]
    devices: tuple[Device, ...]
    links: tuple[LinkRule, ...]
    local: bool = False

    def type_of(self, device: int) -> DeviceType:
        """Type of the device with index `device`."""
        wanted = self.devices[device].type
        for entry in self.types:
            if entry.name == wanted:
                return entry
        raise ClusterError(
            f"device {device} is of unknown type {wanted!r}",
            where=f"cluster {self.name!r}",
            ways_out=(f"known types: {', '.join(entry.name for entry in self.types)}",),
        )

    def link(self, source: int, target: int) -> Link:
        """The link between two device indices. Raises ClusterError when no rule matches."""
        pair = self.devices[source], self.devices[target]
        for rule in self.links:
            if rule.matches(*pair):
                return rule.link
        raise ClusterError(
            f"no link between device {source} (node {pair[0].node}) and {target} "
            f"(node {pair[1].node})",
            where=f"cluster {self.name!r}",
            ways_out=("add a link rule that matches this pair, or one with a = b = '*'",),
        )
