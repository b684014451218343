"""Layouts for whole graphs without a planner: random legal ones, and those that flow."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from cutset.compiler.ir.graph import Graph, Node, Value, ValueKind, users
from cutset.compiler.ir.mesh import Layout, Mesh, Partial, Placement, Replicate, Shard
from cutset.compiler.ir.plan import NodeLayout, ParameterLayout, ValueLayout
from cutset.compiler.sharding.rules import strategies_of
from cutset.compiler.sharding.sharding import make_sharding
from cutset.compiler.sharding.strategy import OpStrategy
from cutset.compiler.sharding.zero import zero_layouts

__all__ = ["Layouts", "flowing_layouts", "picked_layouts", "random_layouts", "zero_layouts_of"]

Chosen = dict[int, list[OpStrategy]]  # by node id, axis after axis
Made = dict[tuple[int, int], Placement]  # by value and axis
Choose = Callable[[Graph, Node, int, list[OpStrategy], Made], OpStrategy]


@dataclass(frozen=True, slots=True)
class Layouts:
    """The tables of a plan."""

    nodes: tuple[NodeLayout, ...]
    values: tuple[ValueLayout, ...] = ()
    parameters: tuple[ParameterLayout, ...] = ()


def random_layouts(graph: Graph, mesh: Mesh, seed: int) -> Layouts:
    """A random legal strategy of every node over every axis; parameters as some reader wants."""
    source = random.Random(seed)
    chosen = _choose(graph, mesh, lambda _g, _n, _a, found, _m: source.choice(found), {})
    held = {
        value.id: source.choice(_wanted(graph, mesh, chosen, value))
        for value in graph.values_of(ValueKind.PARAMETER)
    }
    return _tables(graph, mesh, chosen, held, {})


def flowing_layouts(graph: Graph, mesh: Mesh) -> Layouts:
    """Axis `data` splits the batch; the others split work wherever values flow without exchange.

    A parameter is held as its only reader wants it, else replicated.
    """
    data = [axis.name for axis in mesh.axes].index("data") if mesh.axis("data").size > 1 else None
    inputs = {}
    for value in graph.values_of(ValueKind.INPUT):
        row: list[Placement] = [Replicate()] * len(mesh.axes)
        if data is not None and value.batch_dim is not None:
            row[data] = Shard(value.batch_dim)
        inputs[value.id] = Layout(tuple(row))
    made = {(v, a): p for v, item in inputs.items() for a, p in enumerate(item.placements)}
    chosen = _choose(graph, mesh, _flow, made)
    held = {}
    for value in graph.values_of(ValueKind.PARAMETER):
        wanted = set(_wanted(graph, mesh, chosen, value))
        held[value.id] = wanted.pop() if len(wanted) == 1 else _replicated(mesh)
    return _tables(graph, mesh, chosen, held, inputs)


def picked_layouts(
    graph: Graph, mesh: Mesh, strategies: Sequence[Mapping[str, str]], held: Mapping[str, str]
) -> Layouts:
    """Strategies as text, for each axis by name of node or operator packet, and layouts of
    parameters and inputs by origin; the rest is replicated."""

    def pick(_g: Graph, node: Node, axis: int, found: list[OpStrategy], _m: Made) -> OpStrategy:
        table = strategies[axis]
        wanted = table.get(node.name, table.get(node.op.packet))
        return found[0] if wanted is None else next(s for s in found if str(s) == wanted)

    given, inputs = (
        {
            value.id: Layout.parse(held[value.origin])
            if value.origin in held
            else _replicated(mesh)
            for value in graph.values_of(kind)
        }
        for kind in (ValueKind.PARAMETER, ValueKind.INPUT)
    )
    return _tables(graph, mesh, _choose(graph, mesh, pick, {}), given, inputs)


def zero_layouts_of(graph: Graph, mesh: Mesh, level: int, *, offloaded: bool = False) -> Layouts:
    """`flowing_layouts` with ZeRO of `level` over axis `data`."""
    flowing = flowing_layouts(graph, mesh)
    sharding = make_sharding(graph, mesh, flowing.nodes, flowing.values, flowing.parameters)
    parameters = zero_layouts(graph, sharding, "data", level, offloaded=offloaded)
    return replace(flowing, parameters=parameters)


def _flow(
    graph: Graph,
    node: Node,
    axis: int,
    found: list[OpStrategy],
    made: Made,
) -> OpStrategy:
    """Fewest bytes exchanged; of those, the one that splits most bytes."""

    def cost(strategy: OpStrategy) -> tuple[float, float]:
        moved = split = 0.0
        for value, placement in zip(node.inputs, strategy.inputs, strict=True):
            size = graph.values[value].type.num_bytes
            held = graph.values[value].kind is not ValueKind.RESULT and (value, axis) not in made
            old = made.get((value, axis), Replicate())
            if not held and old != placement and not isinstance(old, Replicate):
                moved += size
            split += size * isinstance(placement, Shard)
        for value, placement in zip(node.outputs, strategy.outputs, strict=True):
            split += graph.values[value].type.num_bytes * isinstance(placement, Shard)
            moved += graph.values[value].type.num_bytes * isinstance(placement, Partial)
        return moved, -split

    return min(found, key=cost)


def _choose(graph: Graph, mesh: Mesh, choose: Choose, made: Made) -> Chosen:
    chosen: Chosen = {}
    for node in graph.nodes:
        picked: list[OpStrategy] = []
        for axis, entry in enumerate(mesh.axes):
            legal = [
                strategy
                for strategy in strategies_of(graph, node, entry.size)
                if _is_legal([*picked, strategy])
            ]
            picked.append(choose(graph, node, axis, legal, made))
            for value, placement in zip(node.outputs, picked[-1].outputs, strict=True):
                made[value, axis] = placement
        chosen[node.id] = picked
    return chosen


def _is_legal(picked: list[OpStrategy]) -> bool:
    """No dim of a tensor is sharded by two axes."""
    rows = zip(*((*strategy.inputs, *strategy.outputs) for strategy in picked), strict=True)
    for row in rows:
        dims = [placement for placement in row if isinstance(placement, Shard)]
        if len(dims) != len(set(dims)):
            return False
    return True


def _wanted(graph: Graph, mesh: Mesh, chosen: Chosen, value: Value) -> list[Layout]:
    """What the readers of a parameter want; a term of it is nothing that can be held."""
    layouts = [_replicated(mesh)] if not users(graph)[value.id] else []
    for number in users(graph)[value.id]:
        position = graph.nodes[number].inputs.index(value.id)
        row = tuple(strategy.inputs[position] for strategy in chosen[number])
        layouts.append(
            Layout(tuple(Replicate() if isinstance(item, Partial) else item for item in row))
        )
    return layouts


def _replicated(mesh: Mesh) -> Layout:
    return Layout((Replicate(),) * len(mesh.axes))


def _tables(
    graph: Graph,
    mesh: Mesh,
    chosen: Chosen,
    held: dict[int, Layout],
    inputs: dict[int, Layout],
) -> Layouts:
    nodes = []
    for number, picked in chosen.items():
        if all(strategy.is_replicated for strategy in picked):
            continue
        rows = [
            tuple(Layout(row) for row in zip(*side, strict=True))
            for side in ([s.inputs for s in picked], [s.outputs for s in picked])
        ]
        nodes.append(NodeLayout((number,), *rows))
    return Layouts(
        tuple(nodes),
        tuple(ValueLayout(graph.values[v].name, layout) for v, layout in inputs.items()),
        tuple(
            ParameterLayout(graph.values[v].name, layout, layout, layout)
            for v, layout in held.items()
        ),
    )
