"""A description of devices and links: what plans are made for.

Bandwidths are bytes per second in one direction, latencies and overheads seconds, memory bytes,
rates floating-point operations per second (one multiply-add counts as two).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from .corrections import PHASES, Corrections
from .errors import ClusterError
from .types import DTYPE_NAMES, dtype_name

__all__ = [
    "COLLECTIVES",
    "HANDLED",
    "CURVES",
    "Cluster",
    "Device",
    "DeviceType",
    "Host",
    "Link",
    "LinkRule",
    "OpCost",
    "PHASES",
    "RateCurve",
]

CURVES = ("matmul", "attention", "convolution", "memory")
"""What a `RateCurve` may be of."""

COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
"""Collectives that a link may have figures of its own for."""

HANDLED = ("all_gather", "reduce_scatter")
"""Those that stages start ahead, or wait for late: what they take of computation is known apart."""


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


Points = tuple[tuple[float, float], ...]

# whose cost of an operator counts, first to last
_ALIKE: dict[torch.dtype, tuple[str, ...]] = {
    **{dtype: (name, "") for dtype, name in DTYPE_NAMES.items()},
    torch.bfloat16: ("bf16", "f16", ""),
    torch.float16: ("f16", "bf16", ""),
}


def _rate_at(points: Points, size: float) -> float:
    """The rate at `size`: straight in both logarithms between points, level beyond them."""
    if size <= points[0][0]:
        return points[0][1]
    for (low, slow), (high, fast) in pairwise(points):
        if size <= high:
            share = math.log(size / low) / math.log(high / low)
            return slow * math.exp(share * math.log(fast / slow))
    return points[-1][1]


def _at_best(points: Points) -> Points:
    return ((1.0, max(rate for _, rate in points)),) if points else ()


@dataclass(frozen=True, slots=True)
class RateCurve:
    """A rate that grows or falls with the size of the work.

    Args:
        kind: one of `CURVES`.
        dtype: short dtype name; empty for `memory`.
        points: (size, rate) with sizes that ascend: operations and operations per second of one
            product, or bytes that one operator moves and bytes per second.
    """

    kind: str
    dtype: str
    points: tuple[tuple[float, float], ...]

    def at(self, size: float) -> float:
        """The rate at `size`: straight in both logarithms between points, level beyond them.

        >>> round(RateCurve("memory", "", ((1e3, 1e9), (1e5, 1e10))).at(1e4) / 1e9, 3)
        3.162
        """
        return _rate_at(self.points, size)


@dataclass(frozen=True, slots=True)
class OpCost:
    """What operators of one kind take in one phase, beside the overhead of one kernel each and one
    pass over memory.

    Args:
        name: packet of the operators (`gelu`) or their category (`norm`); a packet goes before
            the category.
        phase: one of `PHASES`.
        kernels: how many times the overhead of one operator counts.
        points: (bytes that one operator moves, bytes per second) as in a `RateCurve`; empty: those
            of memory.
        dtype: short name of the element type; empty: of every one that has no cost of its own.
    """

    name: str
    phase: str
    kernels: float
    points: tuple[tuple[float, float], ...] = ()
    dtype: str = ""


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
        cores: that all CPU workers of a node share; all that is said here of speed holds while all
            of them compute, and where fewer do, they are faster. None: enough for all of them.
        instruction_seconds: time of the host for one instruction of a program, beside its kernels.
        message_seconds: of a CPU worker, for asking for a message to be sent or received, beside
            its instruction and its bytes; 0: next to nothing, but for those of collectives, which
            are no instructions: as much as one.
        curves: rates by the size of the work, where they are known; they go before the above.
        op_costs: of kinds of operators that were measured.
        corrections: of what the rates predict, by measurement.
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
    cores: int | None = None
    instruction_seconds: float = 0.0
    message_seconds: float = 0.0
    curves: tuple[RateCurve, ...] = ()
    op_costs: tuple[OpCost, ...] = ()
    corrections: Corrections | None = None

    def curve(self, kind: str, dtype: str = "") -> RateCurve | None:
        """The curve of `kind` for `dtype`, if it is known."""
        for curve in self.curves:
            if curve.kind == kind and curve.dtype == dtype:
                return curve
        return None

    def rate(self, dtype: torch.dtype, flops: float = math.inf, kind: str = "matmul") -> float:
        """Rate in flops per second of a product of `dtype` with `flops` operations.

        A `kind` without a curve of its own runs at the rate of `matmul`.
        """
        name = dtype_name(dtype)
        curve = self.curve(kind, name) or self.curve("matmul", name)
        if curve is not None:
            return curve.at(flops)
        rates = dict(self.flops_per_second)
        return rates.get(name, rates.get("f32", min(rates.values())))

    def memory_rate(self, num_bytes: float) -> float:
        """Bytes per second at which an operator moves `num_bytes`, read and written together."""
        curve = self.curve("memory")
        return self.memory_bytes_per_second if curve is None else curve.at(num_bytes)

    @property
    def gains_with_size(self) -> bool:
        """Whether a row takes no longer in a larger microbatch: no rate falls as the work grows,
        and nothing was measured of some sizes alone."""
        tables = [curve.points for curve in self.curves] + [cost.points for cost in self.op_costs]
        return self.corrections is None and all(
            before <= after for points in tables for (_, before), (_, after) in pairwise(points)
        )

    def at_its_best(self) -> DeviceType:
        """A type on which nothing takes longer: no overhead, and every rate at its highest."""
        return replace(
            self,
            overhead_seconds=0.0,
            instruction_seconds=0.0,
            message_seconds=0.0,
            curves=tuple(replace(curve, points=_at_best(curve.points)) for curve in self.curves),
            op_costs=tuple(replace(cost, points=_at_best(cost.points)) for cost in self.op_costs),
        )

    def op_cost(
        self, packet: str, category: str, phase: str, dtype: torch.dtype | None = None
    ) -> OpCost | None:
        """The cost of operators called `packet`, else of their category, if it was measured: in
        `dtype`, else in the other one of half precision (both are converted to be computed with),
        else in none that is named."""
        wanted = _ALIKE.get(dtype, ("",)) if dtype is not None else ("",)
        best = None
        for entry in self.op_costs:
            if entry.phase == phase and entry.name in (packet, category) and entry.dtype in wanted:
                order = entry.name != packet, wanted.index(entry.dtype)
                if best is None or order < best[0]:
                    best = order, entry
        if best is None and phase == "backward_weight":
            return self.op_cost(packet, category, "backward_input", dtype)
        return None if best is None else best[1]

    def op_rate(self, cost: OpCost, num_bytes: float) -> float:
        """Bytes per second of an operator of kind `cost` that moves `num_bytes`."""
        return _rate_at(cost.points, num_bytes) if cost.points else self.memory_rate(num_bytes)


@dataclass(frozen=True, slots=True)
class Device:
    """One device; its position in `Cluster.devices` is the rank that runs on it."""

    index: int
    type: str
    node: str


@dataclass(frozen=True, slots=True)
class LinkRule:
    """The link between two devices: the first rule of the cluster that matches is used.

    Args:
        link: of one message from one device to another.
        a, b: node names, or `*`.
        same_node: True / False restricts to pairs inside one node / across nodes; None matches
            both.
        collectives: (one of `COLLECTIVES`, link of one step of its ring), where it was measured;
            others run at the pace of `link`.
        streams: how many messages of one node go at once at full bandwidth, collectives counting
            as one: k of them have `min(1, streams / k)` of it each. None: any number.
        compute_share: of the rate at which a device at either end computes, what a transfer
            takes away while it runs at full speed.
        progress_share: of its speed, what a transfer keeps while a device at either end computes.
        skew_seconds: how much later than the mean the last of the ranks reaches a collective after
            they have computed alike.
        handling: (one of `HANDLED`, link), where it was measured: what one ring step's bytes take
            of the computation at either end beside which such a collective travels, asking for its
            messages and what threads of CPUs that carry them do.
    """

    link: Link
    a: str = "*"
    b: str = "*"
    same_node: bool | None = None
    collectives: tuple[tuple[str, Link], ...] = ()
    streams: float | None = None
    compute_share: float = 0.0
    progress_share: float = 1.0
    skew_seconds: float = 0.0
    handling: tuple[tuple[str, Link], ...] = ()

    def matches(self, source: Device, target: Device) -> bool:
        if self.same_node is not None and self.same_node != (source.node == target.node):
            return False
        return any(
            self.a in ("*", first.node) and self.b in ("*", second.node)
            for first, second in ((source, target), (target, source))
        )

    def link_of(self, collective: str | None = None) -> Link:
        """The link of one message, or of a ring step of `collective`."""
        return (
            self.link if collective is None else dict(self.collectives).get(collective, self.link)
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

    def threads_of(self, device: int) -> int:
        """Compute threads of a CPU worker among those of its node."""
        kind = self.type_of(device)
        return kind.threads or max(1, (kind.cores or 1) // len(self._workers_beside(device)))

    def core_share(self, device: int) -> float:
        """Of a core for each of its threads, what `device` has while all workers of its node
        compute: 1, unless they are CPU workers that share fewer cores."""
        cores = self.type_of(device).cores
        if cores is None:
            return 1.0
        return min(1.0, cores / sum(map(self.threads_of, self._workers_beside(device))))

    def _workers_beside(self, device: int) -> tuple[int, ...]:
        """The CPU workers of the node of `device`."""
        node = self.devices[device].node
        beside = (other.index for other in self.devices if other.node == node)
        return tuple(index for index in beside if self.type_of(index).backend == "cpu")

    def link(self, source: int, target: int, collective: str | None = None) -> Link:
        """The link between two device indices, for a message or a ring step of `collective`.

        Raises:
            ClusterError: no rule matches.
        """
        return self.rule(source, target).link_of(collective)

    def rule(self, source: int, target: int) -> LinkRule:
        """The rule for two device indices. Raises ClusterError when no rule matches."""
        pair = self.devices[source], self.devices[target]
        for rule in self.links:
            if rule.matches(*pair):
                return rule
        raise ClusterError(
            f"no link between device {source} (node {pair[0].node}) and {target} "
            f"(node {pair[1].node})",
            where=f"cluster {self.name!r}",
            ways_out=("add a link rule that matches this pair, or one with a = b = '*'",),
        )
