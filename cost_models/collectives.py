"""Price of the collectives inside a rank's local graph, forward and adjoint.

What travels is priced by the ring formulas of `links.py` over the devices of the mesh axis, which
have waited for the last of them before (`skew_seconds` of a link). Parts
lie in memory one after the other on the way, so who splits or joins them along a dim also passes
over local memory once: read and written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..compiler.ir.cluster import COLLECTIVES, HANDLED, Cluster, DeviceType, Link
from ..compiler.ir.graph import Node
from ..compiler.ir.mesh import Mesh
from .host_messages import bucket_seconds
from .links import (
    SECONDS_OF,
    all_gather_seconds,
    all_reduce_seconds,
    all_to_all_seconds,
    group_link,
    group_skew_seconds,
    handling_seconds,
    reduce_scatter_seconds,
)
from .overlap import Overlap

__all__ = ["Network", "collective_seconds", "mesh_network"]


@dataclass(frozen=True, slots=True)
class Network:
    """The devices that meet in collectives, for each mesh axis: (axis name, devices)."""

    cluster: Cluster
    groups: tuple[tuple[str, tuple[int, ...]], ...]

    def group(self, axis: str) -> tuple[int, ...]:
        return next(devices for name, devices in self.groups if name == axis)

    def backend(self, axis: str) -> str:
        """torch device type of the devices that meet along `axis`."""
        return self.cluster.type_of(self.group(axis)[0]).backend

    def ring(self, axis: str) -> tuple[int, float, tuple[Link, ...]]:
        """Size, skew and links of the ring along `axis`: all that its collectives' prices follow
        from."""
        group = self.group(axis)
        size = len(set(group))
        kinds = (None, *COLLECTIVES) if size > 1 else ()
        links = tuple(group_link(self.cluster, group, kind) for kind in kinds)
        return size, group_skew_seconds(self.cluster, group), links

    def sum_bytes_seconds(self, axis: str, num_bytes: float, bucket_bytes: float) -> float:
        """All-reduce of `num_bytes` that travel with others, in buckets of `bucket_bytes` at most:
        of a bucket's latency their share, as far as no computation hides it."""
        cluster, group = self.cluster, self.group(axis)
        whole = all_reduce_seconds(cluster, group, num_bytes)
        shown = self.bucket_latency_seconds(axis) * min(1.0, num_bytes / bucket_bytes)
        return whole - all_reduce_seconds(cluster, group, 0.0) + shown

    def bucket_latency_seconds(self, axis: str) -> float:
        """Of the latency of one bucket, what no computation hides."""
        latency = all_reduce_seconds(self.cluster, self.group(axis), 0.0)
        return (1.0 - Overlap.of(self.cluster).hidden) * latency

    def share_bytes_seconds(self, axis: str, num_bytes: float) -> float:
        """What parts of `num_bytes` take in one microbatch of ZeRO 3, at least: they are gathered,
        and their gradients scattered; no latencies."""
        return self.share_seconds(axis, num_bytes) - self.share_seconds(axis, 0.0)

    def share_seconds(self, axis: str, num_bytes: float) -> float:
        """Likewise of one part, with its latencies."""
        cluster, group, seconds = self.cluster, self.group(axis), 0.0
        for name in HANDLED:
            whole = SECONDS_OF[name](cluster, group, num_bytes)
            seconds += min(self.handling_seconds(axis, name, num_bytes) or whole, whole)
        return seconds

    def handling_seconds(self, axis: str, collective: str, num_bytes: float) -> float:
        """What a gather or a sum inside a stage takes of the computation beside which it travels,
        where CPUs carry it and that was measured, else 0."""
        if self.backend(axis) != "cpu":
            return 0.0
        return handling_seconds(self.cluster, self.group(axis), collective, num_bytes)

    def waiting_seconds(self, axis: str, collective: str) -> float:
        """Of an `all_gather` or a `reduce_scatter` beside others, what these do not wait for: over
        gloo, which has messages for it, its latency and the last rank; nothing on CUDA."""
        if self.backend(axis) != "cpu":
            return 0.0
        group = self.group(axis)
        latency = SECONDS_OF[collective](self.cluster, group, 0.0)
        return latency + group_skew_seconds(self.cluster, group)

    def host_seconds(self, axis: str, collective: str, num_bytes: float) -> float:
        """What such a bucket, without its latency, takes of the thread that computes."""
        group = self.group(axis)
        return bucket_seconds(self.cluster, group[0], collective, group, num_bytes).total


def mesh_network(cluster: Cluster, mesh: Mesh, devices: Sequence[int]) -> Network:
    """The network of `mesh` laid over `devices` (last axis fastest).

    Groups of one axis meet at the same time, so its slowest group counts.
    """
    groups = []
    inner = mesh.size
    for axis in mesh.axes:
        inner //= axis.size
        found = [
            tuple(devices[start + inner * position] for position in range(axis.size))
            for start in range(mesh.size)
            if (start // inner) % axis.size == 0
        ]
        slowest = max(found, key=lambda group: all_reduce_seconds(cluster, group, _TYPICAL_BYTES))
        groups.append((axis.name, slowest))
    return Network(cluster, tuple(groups))


_TYPICAL_BYTES = float(1 << 22)


@dataclass(frozen=True, slots=True)
class _Call:
    """One collective: bytes of operand and result, who meets."""

    network: Network
    device_type: DeviceType
    node: Node
    operand_bytes: float
    result_bytes: float
    ahead: bool

    @property
    def group(self) -> tuple[int, ...]:
        axis = self.node.args[1]
        assert isinstance(axis, str)
        return self.network.group(axis)

    def meet(self, seconds: Callable[..., float], num_bytes: float) -> float:
        cluster, group = self.network.cluster, self.group
        return seconds(cluster, group, num_bytes) + group_skew_seconds(cluster, group)

    def sum(self) -> float:
        return self.meet(all_reduce_seconds, self.operand_bytes)

    def gather(self, whole_bytes: float) -> float:
        return self.meet(all_gather_seconds, whole_bytes)

    def scatter(self, whole_bytes: float) -> float:
        return self.meet(reduce_scatter_seconds, whole_bytes)

    def exchange(self) -> float:
        return self.meet(all_to_all_seconds, self.operand_bytes)

    def beside(self, collective: str, seconds: float) -> float:
        """Of `seconds` for the result's bytes, what computation takes longer."""
        axis = self.node.args[1]
        assert isinstance(axis, str)
        taken = self.network.handling_seconds(axis, collective, self.result_bytes)
        return min(taken, seconds) if self.ahead and taken else seconds

    def copy(self, num_bytes: float) -> float:
        moved = 2 * num_bytes
        return moved / self.device_type.memory_rate(moved) + self.device_type.overhead_seconds


def collective_seconds(
    network: Network,
    device_type: DeviceType,
    node: Node,
    *,
    operand_bytes: float,
    result_bytes: float,
    ahead: bool = False,
) -> tuple[float, float]:
    """Seconds of `node` and of its adjoint.

    Args:
        operand_bytes, result_bytes: of the local tensors.
        ahead: of a gather, which starts ahead, and of its adjoint, what they take of computation
            where that is known.
    """
    call = _Call(network, device_type, node, operand_bytes, result_bytes, ahead)
    forward, adjoint = _PRICES[node.op.packet]
    return forward(call), adjoint(call)


def _free(call: _Call) -> float:
    return 0.0


def _cut(call: _Call) -> float:
    """The own part is copied out of the whole."""
    return call.copy(call.result_bytes)


def _gather(call: _Call) -> float:
    whole = call.gather(call.result_bytes) + call.copy(call.result_bytes)
    return call.beside("all_gather", whole)


def _gather_back(call: _Call) -> float:
    return call.gather(call.operand_bytes) + call.copy(call.operand_bytes)


def _ungather(call: _Call) -> float:
    """The own part of a complete gradient, or the sum of its terms."""
    if call.node.args[5] is True:
        whole = call.scatter(call.result_bytes) + call.copy(call.result_bytes)
        return call.beside("reduce_scatter", whole)
    return call.copy(call.operand_bytes)


def _scatter(call: _Call) -> float:
    return call.scatter(call.operand_bytes) + call.copy(call.operand_bytes)


def _exchange(call: _Call) -> float:
    return call.exchange() + call.copy(call.operand_bytes) + call.copy(call.result_bytes)


_Price = Callable[[_Call], float]
_PRICES: dict[str, tuple[_Price, _Price]] = {  # packet -> (forward, adjoint)
    "all_reduce": (_Call.sum, _free),
    "sum_gradient": (_free, _Call.sum),
    "as_partial": (_cut, _free),
    "shard": (_cut, _gather_back),
    "all_gather": (_gather, _ungather),
    "reduce_scatter": (_scatter, _gather_back),
    "all_to_all": (_exchange, _exchange),
}
