"""How fast CPU workers compute that share the cores of their node: its scheduler is fair.

Rates of a cluster hold while all workers of a node compute. Where their threads are more than the
cores, one that computes while others wait has more of a core than then, up to one for each of its
threads. Processor sharing (Kleinrock, Queueing Systems II, 1976, chapter 4) in the limit of short
turns: those of an action are long against turns of milliseconds.
"""

from __future__ import annotations

from collections import defaultdict

from ..compiler.ir.cluster import Cluster

__all__ = ["SharedCores"]


class SharedCores:
    """Which workers of a cluster compute, and how fast they do."""

    def __init__(self, cluster: Cluster) -> None:
        self._cores: dict[int, int] = {}
        self._share: dict[int, float] = {}
        self._threads: dict[int, int] = {}
        self._node = {device.index: device.node for device in cluster.devices}
        self._computing: dict[str, set[int]] = defaultdict(set)  # devices, by node
        for device in cluster.devices:
            cores, share = cluster.type_of(device.index).cores, cluster.core_share(device.index)
            if cores is not None and share < 1.0:
                self._cores[device.index], self._share[device.index] = cores, share
                self._threads[device.index] = cluster.threads_of(device.index)

    def computes(self, device: int, computing: bool) -> tuple[int, ...]:
        """`device` begins to compute, or is done with it: those that compute with others than
        before now, `device` too."""
        if device not in self._cores:
            return (device,) if computing else ()
        beside = self._computing[self._node[device]]
        (beside.add if computing else beside.discard)(device)
        return tuple(sorted(beside))

    def share(self, device: int) -> float:
        """See `Cluster.core_share`."""
        return self._share.get(device, 1.0)

    def speed(self, device: int) -> float:
        """Of the rates of `device`, at how many times it computes now."""
        if device not in self._cores:
            return 1.0
        beside = self._computing[self._node[device]]
        threads = sum(self._threads[index] for index in beside)
        return min(1.0, self._cores[device] / max(threads, 1)) / self._share[device]
