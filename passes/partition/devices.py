"""The devices of a cluster as classes of interchangeable ones, and the links between classes."""

from __future__ import annotations

import math
from collections import defaultdict

from ...compiler.ir.cluster import Cluster, DeviceType, Link
from .problem import DeviceClass
from .statement import Statement

__all__ = ["class_links", "device_classes", "slowest_link", "used_types"]


def used_types(cluster: Cluster) -> tuple[DeviceType, ...]:
    """The types of the cluster that it has devices of, in its order."""
    used = {device.type for device in cluster.devices}
    return tuple(entry for entry in cluster.types if entry.name in used)


def device_classes(statement: Statement) -> tuple[DeviceClass, ...]:
    """Devices grouped by type and link neighbourhood; pinned devices stand alone."""
    cluster = statement.cluster
    alone = {device for _, device in statement.device_pins}
    uniform = len(set(_sample_links(cluster))) <= 1
    position = {entry.name: index for index, entry in enumerate(used_types(cluster))}
    groups: dict[tuple[str, str, int], list[int]] = defaultdict(list)
    for device in cluster.devices:
        single = device.index if device.index in alone else -1
        groups[device.type, "" if uniform else device.node, single].append(device.index)
    return tuple(
        DeviceClass(position[kind], _memory(statement, members[0]), tuple(members))
        for (kind, _, _), members in sorted(groups.items(), key=lambda item: item[1])
    )


def _memory(statement: Statement, device: int) -> int:
    own = statement.cluster.type_of(device).memory_bytes
    limit = statement.memory_limit_bytes
    return own if limit is None else min(own, limit)


def _sample_links(cluster: Cluster) -> list[Link]:
    """The links between one pair of devices of every two nodes and within every node."""
    by_node: dict[str, list[int]] = defaultdict(list)
    for device in cluster.devices:
        by_node[device.node].append(device.index)
    nodes = list(by_node.values())
    links = [cluster.link(node[0], node[1]) for node in nodes if len(node) > 1]
    for index, node in enumerate(nodes):
        links += [cluster.link(node[0], other[0]) for other in nodes[index + 1 :]]
    return links


def class_links(cluster: Cluster, classes: tuple[DeviceClass, ...]) -> tuple[tuple[Link, ...], ...]:
    """Link between devices of every two classes, the slowest one where there are no two."""

    def link(first: DeviceClass, second: DeviceClass) -> Link:
        source = first.devices[0]
        target = second.devices[-1 if first is second else 0]
        return cluster.link(source, target) if source != target else slowest_link(cluster)

    return tuple(tuple(link(first, second) for second in classes) for first in classes)


def slowest_link(cluster: Cluster) -> Link:
    """The worst latency and bandwidth of all links."""
    links = _sample_links(cluster)
    if not links:
        return Link(0.0, math.inf)
    return Link(
        max(link.latency_seconds for link in links), min(link.bytes_per_second for link in links)
    )
