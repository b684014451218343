"""A plan's layouts by name: what localization, verification and prediction ask for.

Names of values and nodes are the same in a model's graph and in the graphs of its stages, so one
`Sharding`, made from the whole graph, serves all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from ..ir.errors import VerificationError
from ..ir.graph import Graph, Node, OutputKind, Value, ValueKind, users
from ..ir.mesh import Layout, Mesh, Partial, Placement, Replicate, Shard
from ..ir.ops import Category
from ..ir.plan import NodeLayout, ParameterLayout, Plan, Stage, ValueLayout
from .rules import strategies_of
from .strategy import OpStrategy, can_shard

__all__ = [
    "Sharding",
    "computed_from_parameters",
    "legal_node_layouts",
    "legal_value_layouts",
    "make_sharding",
    "stage_sharding",
]


@dataclass(frozen=True, slots=True)
class Sharding:
    """How a model's graph lies over an in-stage mesh.

    Args:
        strategies: per node name, its strategy over each axis; nodes without an entry are
            replicated.
        layouts: per value name, the layout that it is made or held in; others are replicated.
        parameters: layouts of parameters, by value name.
        deferred: per value name, the axes on which the gradient stays a term a rank: all its
            readers work on parts, and it is computed from parameters alone. For a parameter the
            terms are summed at the end of the step.
        crossing: per value name, the layout in which it leaves a stage, where that is not the one
            that it is made in.
    """

    mesh: Mesh
    strategies: Mapping[str, tuple[OpStrategy, ...]]
    layouts: Mapping[str, Layout]
    parameters: Mapping[str, ParameterLayout]
    deferred: Mapping[str, frozenset[int]]
    crossing: Mapping[str, Layout] = field(default_factory=dict)

    @staticmethod
    def of(plan: Plan, graph: Graph) -> Sharding:
        """The sharding that `plan` decides for `graph`.

        Raises:
            VerificationError: a layout is illegal for its operator.
        """
        return make_sharding(
            graph, plan.stage_mesh, plan.node_layouts, plan.layouts, plan.parameter_layouts
        )

    @property
    def replicated(self) -> Layout:
        return Layout((Replicate(),) * len(self.mesh.axes))

    def layout(self, value: Value) -> Layout:
        """The layout in which `value` is made or held."""
        return self.layouts.get(value.name, self.replicated)

    def crossing_layout(self, value: Value) -> Layout:
        """The layout in which `value` leaves a stage."""
        return self.crossing.get(value.name, self.layout(value))

    def node_strategies(self, node: Node) -> tuple[OpStrategy, ...] | None:
        """One strategy an axis; None: replicated."""
        return self.strategies.get(node.name)

    def axes_of_terms(self, graph: Graph, node: Node, position: int) -> frozenset[int]:
        """The axes on which `node` of `graph` gives each rank one term of the gradient of its input
        `position`; none if it gives it no gradient."""
        if not any(graph.values[index].requires_grad for index in node.outputs):
            return frozenset()
        return frozenset(
            axis
            for axis in range(len(self.mesh.axes))
            if _leaves_terms(graph, node, position, axis, self.strategies, self.deferred)
        )

    def gradient_layout(self, value: Value) -> Layout:
        """Of the gradient that one rank has of a parameter after backward."""
        held = self.layout(value).placements
        axes = self.deferred.get(value.name, frozenset())
        return Layout(tuple(Partial() if a in axes else p for a, p in enumerate(held)))


def make_sharding(
    graph: Graph,
    mesh: Mesh,
    node_layouts: tuple[NodeLayout, ...],
    layouts: tuple[ValueLayout, ...] = (),
    parameter_layouts: tuple[ParameterLayout, ...] = (),
) -> Sharding:
    """The sharding of `graph` over `mesh`; see `Sharding.of`."""
    strategies: dict[str, tuple[OpStrategy, ...]] = {}
    made = {entry.value: entry.layout for entry in layouts}
    made.update({entry.value: entry.held for entry in parameter_layouts})
    table = _StrategyTable(graph)
    for group in node_layouts:
        for number in group.nodes:
            node = graph.nodes[number]
            chosen = _strategies(table, mesh, node, group)
            if all(strategy.is_replicated for strategy in chosen):
                continue
            strategies[node.name] = chosen
            for value, layout in zip(node.outputs, group.outputs, strict=True):
                made[graph.values[value].name] = layout
    return Sharding(
        mesh=mesh,
        strategies=strategies,
        layouts=made,
        parameters={entry.value: entry for entry in parameter_layouts},
        deferred=_deferred(graph, len(mesh.axes), strategies, made),
    )


def stage_sharding(plan: Plan, graph: Graph, stage: Stage, part: Graph) -> Sharding:
    """The sharding of the graph `part` of one stage over the stage's own mesh.

    A value from another stage arrives in parts along an axis if all that reads it wants the same
    parts, else whole. What leaves is no term of a sum. So gradients that cross are whole, too.

    Raises:
        VerificationError: a layout is illegal for its operator.
    """
    whole = Sharding.of(plan.of_stage(stage), graph)
    made = dict(whole.layouts)
    read_by = users(part)
    for value in part.values_of(ValueKind.BOUNDARY):
        readers = [part.nodes[number] for number in read_by[value.id]]
        made[value.name] = Layout(
            tuple(_arrival(whole, value, readers, axis) for axis in range(len(whole.mesh.axes)))
        )
    crossing = {}
    for output in part.outputs_of(OutputKind.BOUNDARY):
        name = part.values[output.value].name
        if name in made:
            crossing[name] = _without_terms(made[name])
    deferred = _deferred(part, len(whole.mesh.axes), whole.strategies, made)
    return replace(whole, layouts=made, deferred=deferred, crossing=crossing)


def _arrival(sharding: Sharding, value: Value, readers: Iterable[Node], axis: int) -> Placement:
    """How `value`, which no node of the stage computes, arrives along `axis`."""
    wanted: set[Placement] = set()
    for node in readers:
        strategies = sharding.node_strategies(node)
        for position, index in enumerate(node.inputs):
            if index == value.id:
                wanted.add(Replicate() if strategies is None else strategies[axis].inputs[position])
    only = wanted.pop() if len(wanted) == 1 else Replicate()
    return only if isinstance(only, Shard) else Replicate()


def _without_terms(layout: Layout) -> Layout:
    return Layout(tuple(Replicate() if isinstance(p, Partial) else p for p in layout.placements))


def legal_node_layouts(
    graph: Graph, mesh: Mesh, groups: tuple[NodeLayout, ...]
) -> tuple[NodeLayout, ...]:
    """`groups` as far as the nodes of `graph` can run so: replicated over the other axes."""
    table = _StrategyTable(graph)
    kept: dict[tuple[tuple[Layout, ...], tuple[Layout, ...]], list[int]] = {}
    for group in groups:
        for number in group.nodes:
            node = graph.nodes[number]
            legal = frozenset(
                position
                for position, axis in enumerate(mesh.axes)
                if _find_strategy(table, node, axis.size, _along(group, position)) is not None
            )
            if legal and _each_dim_once((*group.inputs, *group.outputs)):
                sides = _only(group.inputs, legal), _only(group.outputs, legal)
                kept.setdefault(sides, []).append(number)
    return tuple(
        NodeLayout(tuple(nodes), inputs, outputs) for (inputs, outputs), nodes in kept.items()
    )


def _only(layouts: tuple[Layout, ...], axes: frozenset[int]) -> tuple[Layout, ...]:
    """`layouts`, replicated but over `axes`."""
    return tuple(
        Layout(tuple(p if i in axes else Replicate() for i, p in enumerate(layout.placements)))
        for layout in layouts
    )


def legal_value_layouts(
    graph: Graph, mesh: Mesh, layouts: tuple[ValueLayout, ...]
) -> tuple[ValueLayout, ...]:
    """`layouts` without those that the values of `graph` are too small for."""
    values = graph.by_name()

    def is_legal(entry: ValueLayout) -> bool:
        return all(
            not isinstance(placement, Shard)
            or can_shard(values[entry.value].type, placement.dim, axis.size)
            for placement, axis in zip(entry.layout.placements, mesh.axes, strict=True)
        )

    return tuple(entry for entry in layouts if is_legal(entry))


class _StrategyTable:
    """Strategies of the nodes of one graph; nodes that look alike share an entry."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._found: dict[object, tuple[OpStrategy, ...]] = {}

    def of(self, node: Node, parts: int) -> tuple[OpStrategy, ...]:
        values = [self._graph.values[index] for index in (*node.inputs, *node.outputs)]
        looks = tuple((value.type, value.requires_grad) for value in values)
        # what indices can point to depends on what they were made from
        origin = node.inputs if node.op.category is Category.INDEXING else ()
        key = (parts, node.op, node.args, node.kwargs, looks, origin, node.random_draw is None)
        if key not in self._found:
            self._found[key] = strategies_of(self._graph, node, parts)
        return self._found[key]


def _strategies(
    table: _StrategyTable, mesh: Mesh, node: Node, group: NodeLayout
) -> tuple[OpStrategy, ...]:
    """The rule's strategy on each axis that has the layouts of `group`."""
    chosen = _find_strategies(table, mesh, node, group)
    if chosen is not None:
        return chosen
    wanted = f"{_listed(group.inputs)} -> {_listed(group.outputs)}"
    raise VerificationError(
        f"{node.op} cannot run as {wanted} over mesh {mesh}",
        where=f"node {node.name} of {node.module_path} ({node.source})",
        ways_out=tuple(
            f"legal over {axis.name}: {'; '.join(map(str, table.of(node, axis.size)))}"
            for axis in mesh.axes
        ),
    )


def _find_strategies(
    table: _StrategyTable, mesh: Mesh, node: Node, group: NodeLayout
) -> tuple[OpStrategy, ...] | None:
    found = [
        _find_strategy(table, node, axis.size, _along(group, position))
        for position, axis in enumerate(mesh.axes)
    ]
    chosen = tuple(strategy for strategy in found if strategy is not None)
    is_legal = len(chosen) == len(found) and _each_dim_once((*group.inputs, *group.outputs))
    return chosen if is_legal else None


_Sides = tuple[tuple[Placement, ...], tuple[Placement, ...]]  # of what a node reads and makes


def _along(group: NodeLayout, axis: int) -> _Sides:
    inputs, outputs = (
        tuple(layout.placements[axis] for layout in side) for side in (group.inputs, group.outputs)
    )
    return inputs, outputs


def _find_strategy(
    table: _StrategyTable, node: Node, parts: int, wanted: _Sides
) -> OpStrategy | None:
    found = (s for s in table.of(node, parts) if (s.inputs, s.outputs) == wanted)
    return next(found, None)


def _each_dim_once(layouts: tuple[Layout, ...]) -> bool:
    """Whether no tensor has a dim that two axes shard."""
    rows = ([p for p in layout.placements if isinstance(p, Shard)] for layout in layouts)
    return all(len(row) == len(set(row)) for row in rows)


def _listed(layouts: tuple[Layout, ...]) -> str:
    return ",".join(map(str, layouts))


def _deferred(
    graph: Graph,
    num_axes: int,
    strategies: Mapping[str, tuple[OpStrategy, ...]],
    made: Mapping[str, Layout],
) -> dict[str, frozenset[int]]:
    """`Sharding.deferred`, from the readers of each value to the value.

    A replicated operator passes terms of a gradient on as they are, since backward is linear in the
    gradient; its results are deferred together, so that it never meets terms and whole gradients
    at once. One that works on parts and makes a replicated result expects a complete gradient.
    """
    weights = computed_from_parameters(graph)
    returned = {output.value for output in graph.outputs if output.kind is not OutputKind.BUFFER}
    read_by = users(graph)
    table: dict[str, frozenset[int]] = {}

    def is_deferred(index: int, axis: int) -> bool:
        value = graph.values[index]
        layout = made.get(value.name)
        if index in returned or index not in weights:
            return False
        if layout is not None and not isinstance(layout.placements[axis], Replicate):
            return False
        readers = (graph.nodes[number] for number in read_by[index])
        return all(
            _leaves_terms(graph, node, node.inputs.index(index), axis, strategies, table)
            for node in readers
        )

    def enter(values: tuple[int, ...], axes: set[int]) -> None:
        carried = [index for index in values if graph.values[index].requires_grad]
        chosen = frozenset(axis for axis in axes if all(is_deferred(i, axis) for i in carried))
        if chosen:
            table.update((graph.values[index].name, chosen) for index in carried)

    for node in reversed(graph.nodes):
        chosen = strategies.get(node.name)
        whole = (a for a in range(num_axes) if chosen is None or chosen[a].is_replicated)
        enter(node.outputs, set(whole))
    for value in graph.values:
        if value.kind is not ValueKind.RESULT:
            enter((value.id,), set(range(num_axes)))
    return table


def _leaves_terms(
    graph: Graph,
    node: Node,
    position: int,
    axis: int,
    strategies: Mapping[str, tuple[OpStrategy, ...]],
    deferred: Mapping[str, frozenset[int]],
) -> bool:
    """Whether `node` gives each rank of `axis` one term of the gradient of what it reads."""
    carried = [graph.values[index] for index in node.outputs if graph.values[index].requires_grad]
    if not carried:
        return True
    chosen = strategies.get(node.name)
    if chosen is not None and not chosen[axis].is_replicated:
        return chosen[axis].has_partial_gradient(position)
    return all(axis in deferred.get(value.name, ()) for value in carried)


def computed_from_parameters(graph: Graph) -> set[int]:
    """Values with a gradient that depend on no activation: parameters and what is made of them."""
    given = (ValueKind.INPUT, ValueKind.BOUNDARY)
    fed = {value.id for value in graph.values if value.kind in given}
    for node in graph.nodes:
        if any(index in fed for index in node.inputs):
            fed.update(node.outputs)
    return {value.id for value in graph.values if value.requires_grad and value.id not in fed}
