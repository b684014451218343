"""State a captured graph and a cluster as a workload of operators and devices.

Devices of one type are one kind; what is pinned to a device makes that device a kind of its own.
Three simplifications are made, all on the safe side or stated in the plan:

* A result crosses by the worst link that a device of the kind has to any other device (for
  throughput, where it was measured: in the time for which the device works on the message and its
  instruction, as the rest passes while it computes), and as a whole: latency + bytes / bandwidth,
  with the bytes of all values of the operator that others read.
* A parameter that several operators read is counted for each of them.
* Activations are not part of an operator's size, as they depend on the order of execution: what
  devices need for them is predicted after placement, and memory set aside for it (`reserve`).

Operators that every stage computes for itself (`replicate.py`: masks, position tables) are left
out. Operators that change a buffer or read one that is changed share a device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import networkx as nx

from ...compiler.ir.blocks import find_blocks
from ...compiler.ir.cluster import Cluster, DeviceType, Link
from ...compiler.ir.errors import InfeasibleError, UsageError
from ...compiler.ir.graph import Graph, Node, OutputKind, ValueKind, producers, users
from ...compiler.ir.paths import matches
from ...compiler.ir.workload import DeviceKind, Operator, Placement, Workload
from ...cost_models.analysis import batch_rows, batch_values
from ...cost_models.ops import price
from ..context import Measured
from ..replicate import replicated_nodes

__all__ = ["GRANULARITIES", "NodeSeconds", "PlacementStatement", "state_workload"]

GRANULARITIES = ("operator", "block")

NodeSeconds = Mapping[str, tuple[float, ...]]
"""Seconds of every node of a graph, by name of the device type."""

_HELD = (ValueKind.PARAMETER, ValueKind.BUFFER, ValueKind.CONSTANT)


@dataclass(frozen=True, slots=True)
class PlacementStatement:
    """A workload, and what its operators and devices stand for.

    Args:
        units: nodes of every operator of the workload.
        devices: device of the cluster, by device of the workload.
        replicated: nodes that every stage that needs them computes for itself.
        seconds: of every node, by name of the device type.
        reserve: bytes that are kept free, by name of the device type.
        measured: for throughput, what was measured.
    """

    graph: Graph
    cluster: Cluster
    workload: Workload
    units: tuple[tuple[int, ...], ...]
    devices: tuple[int, ...]
    replicated: frozenset[int]
    seconds: NodeSeconds
    reserve: Mapping[str, int]
    measured: Measured | None

    def homes(self, placement: Placement) -> dict[int, int]:
        """Device of the cluster of every node that is not replicated."""
        return {
            node: self.devices[device]
            for nodes, device in zip(self.units, placement, strict=True)
            for node in nodes
        }


def state_workload(
    graph: Graph,
    cluster: Cluster,
    *,
    rows: int,
    granularity: str = "operator",
    pins: tuple[tuple[str, int], ...] = (),
    measured: Measured | None = None,
    overlaps: bool = True,
    reserve: Mapping[str, int] | None = None,
) -> PlacementStatement:
    """The workload of `graph` on `cluster`, times in seconds.

    Args:
        rows: of one microbatch, for which times and bytes are stated.
        granularity: `operator`, or `block`: repeated blocks and other modules are placed whole.
        pins: (module path pattern, device): what matches is on that device.
        measured: None: times are those of the roofline model.
        overlaps: devices compute while values are on their way.
        reserve: bytes by name of device type that are kept free for activations.

    Raises:
        InfeasibleError: no device supports some operator, or the one that it is pinned to.
        UsageError: a pin names no device or no module, or contradicts another.
    """
    used = {device.type for device in cluster.devices}
    types = tuple(entry for entry in cluster.types if entry.name in used)
    replicated = _replicated(graph, types)
    units = _blocks(graph, replicated) if granularity == "block" else _single(graph, replicated)
    fraction = rows / batch_rows(graph)
    seconds = (
        measured.nodes
        if measured is not None
        else {
            entry.name: tuple(
                c.forward_seconds for c in price(graph, entry, batch_fraction=fraction)
            )
            for entry in types
        }
    )
    pinned = _pinned(graph, cluster, pins)
    groups = _kinds(cluster, types, frozenset(pinned.values()))
    kinds = tuple(
        DeviceKind(_kind_name(groups, index), len(groups[index][1]), _room(entry, reserve or {}))
        for index, (entry, _) in enumerate(groups)
    )
    links = [
        _message_work(measured, entry.name)
        if measured is not None and overlaps
        else _worst_link(cluster, devices)
        for entry, devices in groups
    ]
    maker = _Operators(graph, groups, links, seconds, pinned, fraction)
    colours = _colours(graph, units)
    operators = tuple(
        maker.operator(nodes, colours.get(index)) for index, nodes in enumerate(units)
    )
    return PlacementStatement(
        graph=graph,
        cluster=cluster,
        workload=Workload(kinds, operators, _edges(graph, units)),
        units=units,
        devices=tuple(device for _, devices in groups for device in devices),
        replicated=replicated,
        seconds=seconds,
        reserve=dict(reserve or {}),
        measured=measured if overlaps else None,
    )


# -- units -------------------------------------------------------------------------------------


def _replicated(graph: Graph, types: tuple[DeviceType, ...]) -> frozenset[int]:
    """Nodes that stages compute for themselves: those that every device can."""
    missing = {name for entry in types for name in entry.unsupported_ops}
    allowed = replicated_nodes(graph)
    kept: set[int] = set()
    chosen: set[int] = set()
    for node in graph.nodes:
        if node.id in allowed and node.op.name not in missing and kept.isdisjoint(node.inputs):
            chosen.add(node.id)
        else:
            kept.update(node.outputs)
    return frozenset(chosen)


def _single(graph: Graph, replicated: frozenset[int]) -> tuple[tuple[int, ...], ...]:
    return tuple((node.id,) for node in graph.nodes if node.id not in replicated)


def _blocks(graph: Graph, replicated: frozenset[int]) -> tuple[tuple[int, ...], ...]:
    """Repeated blocks, and of what is outside them whole modules; those that wait for each other
    are one unit."""
    home: dict[int, str] = {}
    for block in find_blocks(graph):
        for instance in block.instances:
            home.update((node, instance.path) for node in instance.nodes)
    group = {
        node.id: home.get(node.id, f"{node.module_path}()")
        for node in graph.nodes
        if node.id not in replicated
    }
    quotient = nx.DiGraph()
    quotient.add_nodes_from(group.values())
    made_by = producers(graph)
    for node in graph.nodes:
        for value in node.inputs:
            source = made_by.get(value)
            if source in group and node.id in group and group[source] != group[node.id]:
                quotient.add_edge(group[source], group[node.id])
    label = {
        name: index
        for index, names in enumerate(nx.strongly_connected_components(quotient))
        for name in names
    }
    members: dict[int, list[int]] = {}
    for number, name in sorted(group.items()):
        members.setdefault(label[name], []).append(number)
    return tuple(sorted(map(tuple, members.values())))


def _edges(graph: Graph, units: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, int], ...]:
    unit_of = {node: index for index, nodes in enumerate(units) for node in nodes}
    made_by = producers(graph)
    found = set()
    for index, nodes in enumerate(units):
        for node in nodes:
            for value in graph.nodes[node].inputs:
                source = unit_of.get(made_by.get(value, -1))
                if source is not None and source != index:
                    found.add((source, index))
    return tuple(sorted(found))


def _colours(graph: Graph, units: tuple[tuple[int, ...], ...]) -> dict[int, str]:
    """Unit -> name of the state that it reads or changes; states of one unit are one."""
    changed = {output.target: output.value for output in graph.outputs_of(OutputKind.BUFFER)}
    if not changed:
        return {}
    made_by, readers = producers(graph), users(graph)
    unit_of = {node: index for index, nodes in enumerate(units) for node in nodes}
    sharing = nx.Graph()
    for value in graph.values_of(ValueKind.BUFFER):
        for name in (value.origin, *value.aliases):
            if name in changed:
                nodes = [*readers[value.id], made_by.get(changed[name], -1)]
                inside = [unit_of[node] for node in nodes if node in unit_of]
                nx.add_path(sharing, inside)
    return {
        unit: f"state of {min(group)}"
        for group in nx.connected_components(sharing)
        if len(group) > 1
        for unit in group
    }


# -- devices -----------------------------------------------------------------------------------


def _pinned(graph: Graph, cluster: Cluster, pins: tuple[tuple[str, int], ...]) -> dict[int, int]:
    """Node -> device that it is pinned to."""
    found: dict[int, int] = {}
    for pattern, device in pins:
        if not 0 <= device < len(cluster.devices):
            raise UsageError(
                f"pin of {pattern!r} to device {device}, which the cluster does not have",
                where="constraints",
                ways_out=(f"devices are 0 to {len(cluster.devices) - 1}",),
            )
        nodes = [node.id for node in graph.nodes if matches(pattern, node.module_path)]
        if not nodes:
            raise UsageError(
                f"pin {pattern!r} matches no module",
                where="constraints",
                ways_out=("give a module path such as 'model.layers.3', or a pattern with *",),
            )
        for node in nodes:
            if found.setdefault(node, device) != device:
                name = graph.nodes[node].module_path or graph.nodes[node].name
                raise UsageError(
                    f"pins put {name} on two devices, {found[node]} and {device}",
                    where="constraints",
                    ways_out=("make the patterns disjoint",),
                )
    return found


def _kinds(
    cluster: Cluster, types: tuple[DeviceType, ...], pinned: frozenset[int]
) -> tuple[tuple[DeviceType, tuple[int, ...]], ...]:
    """Devices that are alike, those with a pin alone."""
    groups: list[tuple[DeviceType, tuple[int, ...]]] = []
    for entry in types:
        own = [device.index for device in cluster.devices if device.type == entry.name]
        free = tuple(device for device in own if device not in pinned)
        groups += [(entry, (device,)) for device in own if device in pinned]
        groups += [(entry, free)] if free else []
    return tuple(sorted(groups, key=lambda group: group[1]))


def _kind_name(groups: tuple[tuple[DeviceType, tuple[int, ...]], ...], index: int) -> str:
    entry, devices = groups[index]
    alone = sum(other.name == entry.name for other, _ in groups) == 1
    return entry.name if alone else f"{entry.name} (device {', '.join(map(str, devices))})"


def _room(entry: DeviceType, reserve: Mapping[str, int]) -> float:
    return max(
        0.0,
        float(entry.memory_bytes - reserve.get(entry.name, 0)),
    )


def _message_work(measured: Measured, name: str) -> Link:
    link = measured.messages[name]
    asking = measured.instructions.get(name, 0.0)
    return replace(link, latency_seconds=link.latency_seconds + asking)


def _worst_link(cluster: Cluster, devices: tuple[int, ...]) -> Link | None:
    """The highest latency and lowest bandwidth from `devices` to others; None: there are none."""
    links = [
        cluster.link(device, other.index)
        for device in devices
        for other in cluster.devices
        if other.index != device
    ]
    if not links:
        return None
    return Link(
        max(link.latency_seconds for link in links), min(link.bytes_per_second for link in links)
    )


class _Operators:
    """Makes operators of the workload."""

    def __init__(
        self,
        graph: Graph,
        groups: tuple[tuple[DeviceType, tuple[int, ...]], ...],
        links: list[Link | None],
        seconds: NodeSeconds,
        pinned: Mapping[int, int],
        fraction: float,
    ) -> None:
        self._graph, self._groups, self._seconds, self._pinned = graph, groups, seconds, pinned
        self._links = links
        batched = batch_values(graph)
        self._bytes = [
            value.type.num_bytes * (fraction if value.id in batched else 1.0)
            for value in graph.values
        ]
        self._users = users(graph)

    def operator(self, nodes: tuple[int, ...], colour: str | None) -> Operator:
        entries = [self._graph.nodes[node] for node in nodes]
        times = tuple(self._time(nodes, entries, kind) for kind in range(len(self._groups)))
        if all(time is None for time in times):
            raise self._impossible(entries)
        read = {value for node in entries for value in node.inputs}
        inside = set(nodes)
        sent = sum(
            self._bytes[value]
            for node in entries
            for value in node.outputs
            if not inside.issuperset(self._users[value])
        )
        return Operator(
            name=entries[0].name,
            times=times,
            transfers=tuple(link.seconds(sent) if link and sent else 0.0 for link in self._links),
            size=sum(
                self._graph.values[value].type.num_bytes
                for value in read
                if self._graph.values[value].kind in _HELD
            ),
            colour=colour,
        )

    def _time(self, nodes: tuple[int, ...], entries: list[Node], kind: int) -> float | None:
        entry, devices = self._groups[kind]
        if any(node.op.name in entry.unsupported_ops for node in entries):
            return None
        if any(self._pinned.get(node, devices[0]) != devices[0] for node in nodes):
            return None
        return sum(self._seconds[entry.name][node] for node in nodes)

    def _impossible(self, entries: list[Node]) -> InfeasibleError:
        names = sorted({node.op.name for node in entries})
        first = entries[0]
        refused = [
            f"{entry.name} lacks {', '.join(n for n in names if n in entry.unsupported_ops)}"
            for entry in dict.fromkeys(entry for entry, _ in self._groups)
            if any(name in entry.unsupported_ops for name in names)
        ]
        pins = sorted({self._pinned[node.id] for node in entries if node.id in self._pinned})
        reason = "; ".join(
            [*refused, *([f"pinned to {', '.join(f'device {d}' for d in pins)}"] if pins else [])]
        )
        ways = ["add a device that supports it", "take it off unsupported_ops if it does"]
        if pins:
            ways.insert(0, "drop the pin")
        if len(entries) > 1:
            ways.insert(0, "place single operators: granularity='operator'")
        return InfeasibleError(
            f"no device can run {first.op.name if len(entries) == 1 else 'the block'} of "
            f"{first.module_path or first.name}: {reason}",
            where=first.source or first.name,
            ways_out=tuple(ways),
        )
