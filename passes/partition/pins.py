"""What the user pins: module path patterns to stages or devices, as constraints on units."""

from __future__ import annotations

from collections.abc import Hashable

from ...compiler.ir.errors import UsageError
from ...compiler.ir.graph import Graph
from ...compiler.ir.paths import matches
from .problem import DeviceClass
from .statement import Statement, unit_name

__all__ = ["class_pins", "node_labels", "stage_pins", "together_nodes"]


def stage_pins(statement: Statement) -> tuple[tuple[int, int], ...]:
    """(unit, stage) pairs."""
    found: dict[int, int] = {}
    for pattern, stage in statement.pins:
        for unit in _matching_units(statement, pattern):
            if found.setdefault(unit, stage) != stage:
                raise _contradiction(statement, unit, found[unit], stage, "stages")
    return tuple(sorted(found.items()))


def class_pins(
    statement: Statement, classes: tuple[DeviceClass, ...]
) -> tuple[tuple[int, int], ...]:
    """(unit, class of devices) pairs; a pinned device is a class of its own."""
    found: dict[int, int] = {}
    for pattern, device in statement.device_pins:
        known = [index for index, entry in enumerate(classes) if device in entry.devices]
        if not known:
            raise UsageError(
                f"pin of {pattern!r} to device {device}, which the cluster does not have",
                ways_out=(f"devices are 0 to {len(statement.cluster.devices) - 1}",),
            )
        for unit in _matching_units(statement, pattern):
            if found.setdefault(unit, known[0]) != known[0]:
                raise _contradiction(statement, unit, found[unit], device, "devices")
    return tuple(sorted(found.items()))


def _contradiction(
    statement: Statement, unit: int, first: int, second: int, kind: str
) -> UsageError:
    name = unit_name(statement.graph, statement.units[unit])
    return UsageError(
        f"pins put {name} on two {kind}, {first} and {second}",
        ways_out=("make the patterns disjoint", "do not keep together what is pinned apart"),
    )


def _matching_units(statement: Statement, pattern: str) -> list[int]:
    graph = statement.graph
    found = [
        index
        for index, nodes in enumerate(statement.units)
        if any(matches(pattern, graph.nodes[node].module_path) for node in nodes)
    ]
    if not found:
        raise _no_match(pattern)
    return found


def _no_match(pattern: str) -> UsageError:
    return UsageError(
        f"pin {pattern!r} matches no module",
        ways_out=("give a module path such as 'model.layers.3', or a pattern with *",),
    )


def together_nodes(
    graph: Graph, groups: tuple[tuple[str, ...], ...]
) -> tuple[tuple[int, ...], ...]:
    """For each group of patterns the nodes that they match, which must be in one stage.

    Raises:
        UsageError: a pattern matches nothing.
    """
    table = []
    for patterns in groups:
        nodes: set[int] = set()
        for pattern in patterns:
            found = {node.id for node in graph.nodes if matches(pattern, node.module_path)}
            if not found:
                raise _no_match(pattern)
            nodes |= found
        table.append(tuple(sorted(nodes)))
    return tuple(table)


def node_labels(
    graph: Graph, pins: tuple[tuple[str, int], ...], device_pins: tuple[tuple[str, int], ...]
) -> dict[int, Hashable]:
    """Which pins hold for each node that some pin matches: units may not mix them."""
    patterns = [pattern for pattern, _ in (*pins, *device_pins)]
    labels: dict[int, Hashable] = {}
    if not patterns:
        return labels
    for node in graph.nodes:
        hits = tuple(i for i, pattern in enumerate(patterns) if matches(pattern, node.module_path))
        if hits:
            labels[node.id] = hits
    return labels
