"""Rewrite a graph to the part of one rank: local shapes and explicit collectives.

Each node runs under its strategies. Between the layout in which a value is made and the one in
which a node reads it, `localize` puts the cheapest conversions, one an axis; a conversion that
several nodes want is made once. A replicated value that is used on parts passes through
`sum_gradient`, unless its gradient is deferred (see `Sharding`).
"""

from __future__ import annotations

from dataclasses import dataclass

from ..ir.graph import Graph, Node, Output, OutputKind, Value, ValueKind
from ..ir.mesh import Layout, Mesh, Placement, local_offset, local_type
from ..ir.program import TensorShard
from .conversions import convert
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
        origins: by local node, the node of the whole graph that it is for; a conversion is for the
            first node that wants it.
        lasts: by node of the whole graph, the local node that ends its computation; None if the
            local operands already are its results.
        conversions: local nodes that bring a value from one layout to another.
    """

    graph: Graph
    shards: tuple[TensorShard, ...]
    origins: tuple[int, ...]
    lasts: tuple[int | None, ...]
    conversions: frozenset[int]


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
    return LocalPart(
        local,
        tuple(work.shards),
        tuple(work.origins),
        tuple(work.lasts),
        frozenset(work.conversions),
    )


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
        self.origins: list[int] = []
        self.lasts: list[int | None] = []
        self.conversions: set[int] = set()
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
        before = len(self.local.nodes)
        results = lowering.same() if strategies is None or rule is None else rule.lower(lowering)
        for value, ref in zip(node.outputs, results, strict=True):
            self.refs[value] = ref
        count = len(self.local.nodes)
        self.lasts.append(count - 1 if count > before else None)
        self._note_origin(node)

    def _note_origin(self, node: Node) -> None:
        """What was emitted since the last call is for `node`."""
        self.origins += [node.id] * (len(self.local.nodes) - len(self.origins))

    def add_output(self, output: Output) -> Output:
        value = self.graph.values[output.value]
        wanted = self.sharding.replicated
        if output.kind is OutputKind.BOUNDARY:
            wanted = self.sharding.layout(value)
        elif output.kind is OutputKind.BUFFER:
            wanted = self.held.get(output.target, wanted)
        maker = self._maker(value)
        ref = self._read(maker, output.value, wanted, frozenset())
        if output.kind is OutputKind.BOUNDARY:
            ref = self.local.named(ref, value.name, maker)
        self._note_origin(maker)
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
            before = len(self.local.nodes)
            self._made[key] = convert(
                self.local,
                self.refs[value],
                source.type.shape,
                made=made,
                wanted=wanted,
                partial=partial - deferred,
                like=node,
            )
            self.conversions.update(range(before, len(self.local.nodes)))
        return self._made[key]


def _stacked(by_axis: list[tuple[Placement, ...]]) -> tuple[Layout, ...]:
    """Layouts of the tensors from their placements axis by axis."""
    return tuple(Layout(placements) for placements in zip(*by_axis, strict=True))
