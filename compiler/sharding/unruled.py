"""Operators that have no sharding rule: what that cost a plan is said, not hidden."""

from __future__ import annotations

from ..ir.graph import Graph, Node, Value
from ..ir.mesh import Replicate
from .rules import rule_of
from .sharding import Sharding

__all__ = ["unruled_warnings"]


def unruled_warnings(graph: Graph, sharding: Sharding) -> tuple[str, ...]:
    """One warning for each operator without a rule, and axis, that reads values that lay in parts:
    they are put together for it, and every rank of the axis computes all of it."""
    found: dict[tuple[str, int], list[tuple[Node, Value]]] = {}
    for node in graph.nodes:
        if rule_of(node) is not None:
            continue
        for axis in range(len(sharding.mesh.axes)):
            split = [value for value in _inputs(graph, node) if _is_split(sharding, value, axis)]
            if split:
                found.setdefault((node.op.name, axis), []).append((node, split[0]))
    return tuple(
        _warning(op, sharding.mesh.axes[axis].name, sharding, places)
        for (op, axis), places in found.items()
    )


def _inputs(graph: Graph, node: Node) -> list[Value]:
    return [graph.values[index] for index in node.inputs]


def _is_split(sharding: Sharding, value: Value, axis: int) -> bool:
    return not isinstance(sharding.layout(value).placements[axis], Replicate)


def _warning(op: str, axis: str, sharding: Sharding, places: list[tuple[Node, Value]]) -> str:
    node, value = places[0]
    others = f", and {len(places) - 1} more like it" if len(places) > 1 else ""
    return (
        f"{op} has no sharding rule: every rank of axis {axis} computes all of it, from "
        f"{value.name} put together from {sharding.layout(value)}; in module "
        f"{node.module_path or 'the model itself'} at {node.source or 'an unknown line'}{others}"
    )
