"""Rewrite a graph to the part of one rank: local shapes and explicit collectives.

Each node runs under its strategies. Between the layout in which a value is made and the one in
which a node reads it, `localize` puts the cheapest conversions, one an axis; a conversion that
several nodes want is made once. A replicated value that is used on parts passes through
`sum_gradient`, unless its gradient is deferred (see `Sharding`).
"""

from __future__ import annotations

from dataclasses import dataclass

from ..ir.graph import Graph, Node, Output, OutputKind, Value, ValueKind
from ..ir.mesh import (
    Layout,
    Mesh,
    Partial,
    Placement,
    Replicate,
    Shard,
    local_offset,
    local_type,
)
from ..ir.program import TensorShard
from .lowering import LocalGraph, Lowering, Ref
from .rules import rule_of
from .sharding import Sharding
from .strategy import OpView

__all__ = ["LocalPart", "localize"]


@dataclass(frozen=True, slots=True)
class LocalPart:
    """What one rank runs of a graph.

    Args:
        graph: with local types; values keep their names.
        shards: which parts of the tensors that are not computed it holds, for those it does not
            hold whole.
    """

    graph: Graph
    shards: tuple[TensorShard, ...]


def localize(graph: Graph, sharding: Sharding, coordinate: tuple[int, ...]) -> LocalPart:
    """The part of `graph` (of a whole model or of one stage) at `coordinate` of the mesh."""
    work = _Localizer(graph, sharding, coordinate)
    work.add_given()
    for node in graph.nodes:
        work.add_node(node)
    outputs = tuple(work.add_output(output) for output in graph.outputs)
    values = tuple(work.local.values)
    local = Graph(
        name=graph.name,
        mode=graph.mode,
        values=values,
        nodes=tuple(work.local.nodes),
        inputs=tuple(work.refs[value].id for value in graph.inputs),
        outputs=outputs,
    )
    return LocalPart(local, tuple(work.shards))


class _Localizer:
    """Working state of `localize`."""

    def __init__(self, graph: Graph, sharding: Sharding, coordinate: tuple[int, ...]) -> None:
        self.graph = graph
        self.sharding = sharding
        self.mesh: Mesh = sharding.mesh
        self.coordinate = coordinate
        self.local = LocalGraph(
            self.mesh, coordinate, reserved=frozenset(value.name for value in graph.values)
        )
        self.refs: dict[int, Ref] = {}  # global value -> local one, in the layout it is made in
        self.shards: list[TensorShard] = []
        self.held: dict[str, Layout] = {}  # by every name of a buffer
        self._made: dict[tuple[int, Layout, frozenset[int]], Ref] = {}

    def add_given(self) -> None:
        for value in self.graph.values:
            if value.kind is not ValueKind.RESULT:
                self._add_given(value)

    def _add_given(self, value: Value) -> None:
        layout = self.sharding.layout(value)
        if value.kind is ValueKind.BUFFER:
            self.held.update(dict.fromkeys((value.origin, *value.aliases), layout))
        type = local_type(value.type, layout, self.mesh, self.coordinate)
        self.refs[value.id] = self.local.add_value(
            value.name,
            type,
            value.kind,
            origin=value.origin,
            requires_grad=value.requires_grad,
            batch_dim=value.batch_dim,
            aliases=value.aliases,
        )
        if type != value.type and value.kind is not ValueKind.BOUNDARY:
            offset = local_offset(value.type, layout, self.mesh, self.coordinate)
            self.shards.append(TensorShard(value.origin, value.type, offset, type))

    def add_node(self, node: Node) -> None:
        strategies = self.sharding.node_strategies(node)
        whole = self.sharding.replicated
        layouts = (whole,) * len(node.inputs), (whole,) * len(node.outputs)
        if strategies is not None:
            layouts = (
                _stacked([strategy.inputs for strategy in strategies]),
                _stacked([strategy.outputs for strategy in strategies]),
            )
        inputs = [
            self._read(
                node,
                value,
                layouts[0][position],
                self.sharding.axes_of_terms(self.graph, node, position),
            )
            for position, value in enumerate(node.inputs)
        ]
        lowering = Lowering(
            view=OpView(self.graph, node),
            local=self.local,
            inputs=tuple(inputs),
            input_layouts=layouts[0],
            output_layouts=layouts[1],
        )
        rule = rule_of(node)
        results = lowering.same() if strategies is None or rule is None else rule.lower(lowering)
        for value, ref in zip(node.outputs, results, strict=True):
            self.refs[value] = ref

    def add_output(self, output: Output) -> Output:
        value = self.graph.values[output.value]
        wanted = self.sharding.replicated
        if output.kind is OutputKind.BOUNDARY:
            wanted = self.sharding.layout(value)
        elif output.kind is OutputKind.BUFFER:
            wanted = self.held.get(output.target, wanted)
        ref = self._read(self._maker(value), output.value, wanted, frozenset())
        return Output(output.kind, ref.id, output.target, output.batch_dim)

    def _maker(self, value: Value) -> Node:
        """The node that conversions of `value` for an output are named after."""
        made = (node for node in self.graph.nodes if value.id in node.outputs)
        return next(made, self.graph.nodes[0])

    def _read(self, node: Node, value: int, wanted: Layout, partial: frozenset[int]) -> Ref:
        """`value` as `node` reads it; `partial`: axes on which its gradient is a term a rank."""
        source = self.graph.values[value]
        deferred = self.sharding.deferred.get(source.name, frozenset())
        if not source.requires_grad:
            partial = frozenset()
        made = self.sharding.layout(source)
        key = (value, wanted, partial - deferred)
        if key not in self._made:
            self._made[key] = self._convert(node, value, made, wanted, partial - deferred)
        return self._made[key]

    def _convert(
        self, node: Node, value: int, made: Layout, wanted: Layout, partial: frozenset[int]
    ) -> Ref:
        ref = self.refs[value]
        shape = self.graph.values[value].type.shape
        for axis, old, new in conversion_steps(made, wanted):
            ref = self._convert_axis(node, ref, shape, axis, (old, new), axis in partial)
        for axis in sorted(partial):
            if not isinstance(made.placements[axis], Shard):
                ref = self.local.sum_gradient(ref, self.mesh.axes[axis].name, node)
        return ref

    def _convert_axis(
        self,
        node: Node,
        ref: Ref,
        shape: tuple[int, ...],
        axis: int,
        change: tuple[Placement, Placement],
        partial: bool,
    ) -> Ref:
        name = self.mesh.axes[axis].name
        local = self.local
        match change:
            case Shard(old), Shard(new) if old != new:
                return local.all_to_all(
                    ref, name, from_dim=old, from_size=shape[old], to_dim=new, like=node
                )
            case Shard(old), Replicate():
                return local.all_gather(ref, name, old, shape[old], node, partial_gradient=partial)
            case Partial(reduction), Replicate():
                return local.all_reduce(ref, name, node, reduction)
            case Partial("sum"), Shard(new):
                return local.reduce_scatter(ref, name, new, node)
            case Replicate(), Shard(new):
                return local.shard(ref, name, new, node)
            case Replicate(), Partial("sum"):
                return local.as_partial(ref, name, node)
            case Shard(old), Partial("sum"):
                return local.pad_part(ref, name, old, shape[old], node)
            case old, new:
                assert old == new, f"no conversion from {old} to {new}"
                return ref


def conversion_steps(made: Layout, wanted: Layout) -> tuple[tuple[int, Placement, Placement], ...]:
    """(axis, old, new) in the order in which placements change.

    What makes tensors smaller comes first; but a dim is split over an axis only when no other axis
    splits it any more. Of two axes that exchange their dims, one is made whole on the way.
    """
    now = list(made.placements)
    steps: list[tuple[int, Placement, Placement]] = []
    while now != list(wanted.placements):
        changing = [axis for axis, old in enumerate(now) if old != wanted.placements[axis]]
        free = [
            axis
            for axis in changing
            if not isinstance(wanted.placements[axis], Shard)
            or all(now[other] != wanted.placements[axis] for other in range(len(now)))
        ]
        axis = min(
            free or changing, key=lambda axis: (_growth(now[axis], wanted.placements[axis]), axis)
        )
        new = wanted.placements[axis] if free else Replicate()
        steps.append((axis, now[axis], new))
        now[axis] = new
    return tuple(steps)


def _growth(old: Placement, new: Placement) -> int:
    """Smaller comes first: splitting, exchanging, summing, gathering."""
    if isinstance(new, Shard):
        return 1 if isinstance(old, Shard) else 0
    return 3 if isinstance(old, Shard) else 2


def _stacked(by_axis: list[tuple[Placement, ...]]) -> tuple[Layout, ...]:
    """Layouts of the tensors from their placements axis by axis."""
    return tuple(Layout(placements) for placements in zip(*by_axis, strict=True))
