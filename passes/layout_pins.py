"""Layouts of parameters that the user pins: which values they are, and whether that is possible."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ..compiler.ir.errors import UsageError
from ..compiler.ir.graph import Graph, Value, ValueKind, users
from ..compiler.ir.mesh import Mesh, Placement, Replicate, Shard
from ..compiler.ir.paths import matches
from ..compiler.sharding.rules import strategies_of
from .context import LayoutPin

__all__ = ["can_hold", "held_placements"]


def can_hold(graph: Graph, pins: Iterable[LayoutPin], mesh: Mesh) -> bool:
    """Whether every parameter that is pinned has a reader that takes it so on `mesh`."""
    return all(
        pin.placement in _legal(graph, value, mesh.axis(pin.axis).size)
        for pin in pins
        for value in _meant(graph, pin)
    )


def held_placements(
    graph: Graph, pins: Iterable[LayoutPin], mesh: Mesh
) -> Mapping[str, Mapping[str, Placement]]:
    """By value name, the pinned placement over each axis (by its name) of `mesh`.

    Raises:
        UsageError: a pin matches nothing, contradicts another one, or asks for a placement that no
            reader of the parameter can take on `mesh`.
    """
    table: dict[str, dict[str, Placement]] = {}
    for pin in pins:
        for value in _meant(graph, pin):
            parts = mesh.axis(pin.axis).size
            legal = _legal(graph, value, parts)
            if pin.placement not in legal:
                raise _refused(
                    pin,
                    f"no reader of {value.origin} ({value.type}) takes it as {pin.placement} over "
                    f"{parts} rank{'' if parts == 1 else 's'}",
                    f"legal: {', '.join(f'{pin.axis}={placement}' for placement in legal)}",
                )
            placed = table.setdefault(value.name, {})
            if placed.setdefault(pin.axis, pin.placement) != pin.placement:
                raise _refused(
                    pin,
                    f"{value.origin} is also pinned to {pin.axis}={placed[pin.axis]}",
                    "make the patterns disjoint",
                )
    return table


def _meant(graph: Graph, pin: LayoutPin) -> list[Value]:
    """The parameters that a pin matches, by any of their names or a module around them."""
    found = [
        value
        for value in graph.values_of(ValueKind.PARAMETER)
        if any(name and matches(pin.pattern, name) for name in (value.origin, *value.aliases))
    ]
    if not found:
        raise _refused(
            pin,
            "the pin matches no parameter",
            "give a parameter's path such as 'model.layers.3.mlp.down_proj.weight', or a pattern "
            "with *",
        )
    return found


def _legal(graph: Graph, value: Value, parts: int) -> tuple[Placement, ...]:
    """Replication, and what some reader takes over `parts` ranks."""
    legal: dict[Placement, None] = {Replicate(): None}
    for number in users(graph)[value.id] if parts > 1 else ():
        node = graph.nodes[number]
        position = node.inputs.index(value.id)
        for strategy in strategies_of(graph, node, parts):
            if isinstance(strategy.inputs[position], Shard):
                legal[strategy.inputs[position]] = None
    return tuple(legal)


def _refused(pin: LayoutPin, cause: str, way_out: str) -> UsageError:
    return UsageError(cause, where=f"constraints: {pin}", ways_out=(way_out,))
