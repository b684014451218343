"""Devices that are no slower than any of a cluster, to bound what stages on unlike ones take.

With r the least ratio of any rate of the fastest type to that of another, nothing computes in less
than r times the seconds that it takes on the fastest. Let y be what the nodes of a stage take on
the fastest type, with all that is no computation divided by the largest r of the cluster. Then the
stage takes at least r y, and the sum of y over the stages is no less than under the layouts that
are best for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..compiler.ir.cluster import Cluster, DeviceType, Link, LinkRule
from .partition.devices import used_types

__all__ = ["BestDevices"]


@dataclass(frozen=True, slots=True)
class BestDevices:
    """A cluster of the fastest type, whose latencies, overheads and links are divided by the
    largest ratio.

    Args:
        paces: ratio of each type, by name.
    """

    cluster: Cluster
    paces: dict[str, float]

    @staticmethod
    def of(cluster: Cluster) -> BestDevices | None:
        """None if no type is the fastest in everything, if curves or measured prices say more than
        rates, or if hosts carry messages."""
        kinds = used_types(cluster)
        plain = not any(kind.curves or kind.op_costs or kind.corrections for kind in kinds)
        if not plain or len({kind.backend for kind in kinds}) > 1 or kinds[0].backend == "cpu":
            return None
        best = max(kinds, key=lambda kind: kind.memory_bytes_per_second)
        paces = {kind.name: _pace(best, kind) for kind in kinds}
        if not all(_is_no_slower(best, kind) and paces[kind.name] >= 1.0 for kind in kinds):
            return None
        most = max(paces.values())
        chosen = replace(best, overhead_seconds=best.overhead_seconds / most)
        devices = tuple(replace(device, type=best.name) for device in cluster.devices)
        links = tuple(_faster(rule, most) for rule in cluster.links)
        fast = replace(cluster, types=(chosen,), devices=devices, links=links)
        return BestDevices(fast, paces)

    def rounds(self, cluster: Cluster, groups: Sequence[Sequence[int]], count: int) -> float:
        """What a step takes at least, in multiples of what y is in the mean of the stages on
        `groups`: with one stage filled after the other, the fastest first, as in
        `mesh_bounds.py`."""
        kinds = [[cluster.devices[device].type for device in group] for group in groups]
        rates = sorted(
            (1.0 / max(self.paces[name] for name in names) for names in kinds), reverse=True
        )
        done, least = 0.0, float("inf")
        for number, rate in enumerate(rates, 1):
            done += rate
            least = min(least, (number + count - 1) / done)
        return len(groups) * least


def _pace(best: DeviceType, kind: DeviceType) -> float:
    """The least ratio of any rate."""
    fast, slow = dict(best.flops_per_second), dict(kind.flops_per_second)
    ratios = [
        fast.get(name, fast.get("f32", min(fast.values())))
        / slow.get(name, slow.get("f32", min(slow.values())))
        for name in {*fast, *slow}
    ]
    return min(best.memory_bytes_per_second / kind.memory_bytes_per_second, *ratios)


def _is_no_slower(best: DeviceType, kind: DeviceType) -> bool:
    lacks = set(best.unsupported_ops) - set(kind.unsupported_ops)
    return best.overhead_seconds <= kind.overhead_seconds and not lacks


def _faster(rule: LinkRule, ratio: float) -> LinkRule:
    def link(slow: Link) -> Link:
        return Link(slow.latency_seconds / ratio, slow.bytes_per_second * ratio)

    return replace(
        rule,
        link=link(rule.link),
        collectives=tuple((name, link(entry)) for name, entry in rule.collectives),
        skew_seconds=rule.skew_seconds / ratio,
        handling=tuple((name, link(entry)) for name, entry in rule.handling),
    )
