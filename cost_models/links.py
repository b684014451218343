"""Time of transfers between devices: alpha-beta for one link, ring algorithms for groups.

A message of n bytes takes `latency + n / bandwidth`. A ring of p devices runs at the pace of its
slowest link: all-reduce makes 2 (p - 1) steps of n / p bytes, reduce-scatter, all-gather and
all-to-all p - 1 steps (Thakur, Rabenseifner and Gropp, 2005). A link may have latency and bandwidth
of its own for the steps of a collective.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from ..compiler.ir.cluster import Cluster, Link
from ..compiler.ir.memo import once_per_object

__all__ = [
    "SECONDS_OF",
    "all_gather_seconds",
    "all_reduce_seconds",
    "all_to_all_seconds",
    "group_link",
    "group_skew_seconds",
    "handling_seconds",
    "reduce_scatter_seconds",
    "ring",
    "transfer_seconds",
]


def transfer_seconds(cluster: Cluster, source: int, target: int, num_bytes: float) -> float:
    """Seconds of sending `num_bytes` from device `source` to `target`; 0 within one device."""
    return 0.0 if source == target else cluster.link(source, target).seconds(num_bytes)


_Key = tuple[str | None, tuple[int, ...]]


@once_per_object
def _ring_links(cluster: Cluster) -> dict[_Key, Link]:
    """Links of the rings of `cluster` that were asked for, by collective and devices; `group_link`
    fills it."""
    return {}


def ring(cluster: Cluster, devices: Iterable[int]) -> tuple[tuple[int, int], ...]:
    """Edges of the ring of `devices`, ordered by node; none of a single one."""
    ordered = sorted(set(devices), key=lambda index: (cluster.devices[index].node, index))
    if len(ordered) < 2:
        return ()
    return tuple(zip(ordered, (*ordered[1:], ordered[0]), strict=True))


def group_link(cluster: Cluster, devices: Sequence[int], collective: str | None = None) -> Link:
    """The worst latency and bandwidth around the ring of `devices` (ordered by node), for messages
    or for the steps of `collective`."""
    links = _ring_links(cluster)
    key = collective, tuple(devices)
    if key not in links:
        around = [cluster.link(*edge, collective) for edge in ring(cluster, devices)]
        links[key] = Link(
            max(link.latency_seconds for link in around),
            min(link.bytes_per_second for link in around),
        )
    return links[key]


def group_skew_seconds(cluster: Cluster, devices: Sequence[int]) -> float:
    """How long `devices` that have computed alike wait in a collective for the last of them."""
    rules = (cluster.rule(*edge) for edge in ring(cluster, devices))
    return max((rule.skew_seconds for rule in rules), default=0.0)


@once_per_object
def _handling_links(cluster: Cluster) -> dict[_Key, Link | None]:
    """As `_ring_links`, of what collectives take of computation; `handling_seconds` fills it."""
    return {}


def handling_seconds(
    cluster: Cluster, devices: Sequence[int], collective: str, num_bytes: float
) -> float:
    """What `collective`, of so many bytes as it travels in `..._seconds`, takes of the computation
    of each of `devices` that goes on beside it; 0 where that was not measured."""
    links = _handling_links(cluster)
    key = collective, tuple(devices)
    if key not in links:
        rules = {cluster.rule(*edge) for edge in ring(cluster, devices)}
        found = [dict(rule.handling).get(collective) for rule in rules]
        known = [link for link in found if link is not None]
        links[key] = None
        if known and len(known) == len(found):
            links[key] = Link(
                max(link.latency_seconds for link in known),
                min(link.bytes_per_second for link in known),
            )
    link, size = links[key], len(set(devices))
    return 0.0 if link is None else (size - 1) * link.seconds(num_bytes / size)


def _ring_seconds(
    cluster: Cluster,
    devices: Sequence[int],
    collective: str,
    num_bytes: float,
    rounds_per_hop: float = 1.0,
) -> float:
    size = len(set(devices))
    if size < 2:
        return 0.0
    link = group_link(cluster, devices, collective)
    return rounds_per_hop * (size - 1) * link.seconds(num_bytes / size)


def all_reduce_seconds(cluster: Cluster, devices: Sequence[int], num_bytes: float) -> float:
    """Ring all-reduce of a tensor of `num_bytes` held by each of `devices`."""
    return _ring_seconds(cluster, devices, "all_reduce", num_bytes, 2.0)


def reduce_scatter_seconds(cluster: Cluster, devices: Sequence[int], num_bytes: float) -> float:
    """Ring reduce-scatter; `num_bytes` is the size of the whole tensor on each device before."""
    return _ring_seconds(cluster, devices, "reduce_scatter", num_bytes)


def all_gather_seconds(cluster: Cluster, devices: Sequence[int], num_bytes: float) -> float:
    """Ring all-gather; `num_bytes` is the size of the whole tensor on each device after."""
    return _ring_seconds(cluster, devices, "all_gather", num_bytes)


def all_to_all_seconds(cluster: Cluster, devices: Sequence[int], num_bytes: float) -> float:
    """All-to-all; `num_bytes` is what each device holds, of which 1/p stays."""
    return _ring_seconds(cluster, devices, "all_to_all", num_bytes)


SECONDS_OF: dict[str, Callable[[Cluster, Sequence[int], float], float]] = {
    "all_reduce": all_reduce_seconds,
    "reduce_scatter": reduce_scatter_seconds,
    "all_gather": all_gather_seconds,
    "all_to_all": all_to_all_seconds,
}
"""The above by name."""
