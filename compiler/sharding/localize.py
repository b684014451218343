"""Rewrite a graph to the part of one rank: local shapes and explicit collectives.

Each node runs under its strategies. Between the layout in which a value is made and the one in
which a node reads it, `localize` puts the cheapest conversions, one an axis; a conversion that
several nodes want is made once. A replicated value that is used on parts passes through
`sum_gradient`, unless its gradient is deferred (see `Sharding`).
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace

from ..ir.graph import Graph, Node, Output, OutputKind, Value, ValueKind
from ..ir.mesh import Layout, Mesh, Placement, local_offset, local_type
from ..ir.program import TensorShard
from ..ir.types import TensorType
from .conversions import convert
from .lowering import LocalGraph, Lowering, Ref
from .rules import rule_of
from .sharding import Sharding
from .strategy import OpView

__all__ = ["LocalPart", "localize", "localize_each"]

_FEW = 0.25  # of the steps; if more are another on another rank, its graph is made as a whole
_MANY = 16  # steps; if more are, it is one that graphs of further ranks are made from


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
    return next(localize_each(graph, sharding, (coordinate,)))


def localize_each(
    graph: Graph, sharding: Sharding, coordinates: Iterable[tuple[int, ...]]
) -> Iterator[LocalPart]:
    """The parts of `graph` at `coordinates`; where they are equal, one graph serves them all."""
    made: list[tuple[_Localizer, LocalPart]] = []
    for coordinate in coordinates:
        differ = [work.local.steps_that_differ(coordinate) for work, _ in made]
        nearest = min(range(len(made)), key=lambda index: len(differ[index]), default=None)
        moved = None
        if nearest is not None and len(differ[nearest]) <= _FEW * len(graph.nodes):
            work, part = made[nearest]
            moved = work.moved(part, coordinate, differ[nearest])
        if moved is None:
            work = _Localizer(graph, sharding, coordinate)
            moved = work, work.run()
        found = moved[1]
        if nearest is None or len(differ[nearest]) > _MANY:
            made.append(moved)
        yield replace(found, shards=_shards(graph, sharding, coordinate))


def _shards(
    graph: Graph, sharding: Sharding, coordinate: tuple[int, ...]
) -> tuple[TensorShard, ...]:
    """Parts of tensors that are not computed, of those that are not held whole."""
    mesh = sharding.mesh
    places: dict[object, tuple[TensorType, tuple[int, ...]]] = {}
    shards = []
    for value in graph.values:
        if value.kind in (ValueKind.RESULT, ValueKind.BOUNDARY):
            continue
        key = type, layout = value.type, sharding.layout(value)
        if key not in places:
            offset = local_offset(type, layout, mesh, coordinate)
            places[key] = local_type(type, layout, mesh, coordinate), offset
        part, offset = places[key]
        if part != type:
            shards.append(TensorShard(value.origin, type, offset, part))
    return tuple(shards)


@dataclass(frozen=True, slots=True)
class _Step:
    """What one node of the whole graph has led to: ranges of local nodes and values, reads that it
    was the first to ask for."""

    node: Node
    nodes: slice
    values: slice
    reads: tuple[_Read, ...]


_Read = tuple[int, Layout, frozenset[int]]  # value, layout wanted, axes of terms of its gradient


class _Localizer:
    """Working state of `localize`."""

    def __init__(self, graph: Graph, sharding: Sharding, coordinate: tuple[int, ...]) -> None:
        self.graph = graph
        self.sharding = sharding
        self.mesh: Mesh = sharding.mesh
        self.local = LocalGraph(
            self.mesh, coordinate, reserved=frozenset(value.name for value in graph.values)
        )
        self.refs: dict[int, Ref] = {}  # global value -> local one, in the layout it is made in
        self.held: dict[str, Layout] = {}  # by every name of a buffer
        self.origins: list[int] = []
        self.lasts: list[int | None] = []
        self.conversions: set[int] = set()
        self.steps: list[_Step] = []
        self._made: dict[_Read, Ref] = {}

    def run(self) -> LocalPart:
        """The part of the whole graph, without shards."""
        self.add_given()
        for node in self.graph.nodes:
            self.add_node(node)
        self.local.step = len(self.steps) + 1
        outputs = tuple(self.add_output(output) for output in self.graph.outputs)
        graph = Graph(
            name=self.graph.name,
            mode=self.graph.mode,
            values=tuple(self.local.values),
            nodes=tuple(self.local.nodes),
            inputs=tuple(self.refs[value].id for value in self.graph.inputs),
            outputs=outputs,
        )
        return LocalPart(
            graph, (), tuple(self.origins), tuple(self.lasts), frozenset(self.conversions)
        )

    def moved(
        self, part: LocalPart, coordinate: tuple[int, ...], steps: Collection[int]
    ) -> tuple[_Localizer, LocalPart] | None:
        """`part`, which this made, at another coordinate, with what would have made it there: nodes
        of `steps`, which differ, are made anew. None if more than their arguments would change."""
        nodes = list(part.graph.nodes)
        work = _Localizer(self.graph, self.sharding, coordinate)
        work.refs, work._made = dict(self.refs), dict(self._made)
        work.local.names = {value.name for value in part.graph.values}
        for number in sorted(steps):
            if not 0 < number <= len(self.steps):
                return None
            work.steps = self.steps[: number - 1]
            step = self.steps[number - 1]
            if not self._repeated(work, part, step):
                return None
            nodes[step.nodes] = work.local.nodes[step.nodes]
        work.steps = self.steps
        work.local.ask_as(self.local)
        if not steps:
            return work, part
        return work, replace(part, graph=replace(part.graph, nodes=tuple(nodes)))

    def _repeated(self, work: _Localizer, part: LocalPart, step: _Step) -> bool:
        """Take `step` in `work`, which is elsewhere; whether nothing but arguments of its nodes is
        another there."""
        values, nodes = part.graph.values, part.graph.nodes
        work.local.values = list(values[: step.values.start])
        work.local.nodes = list(nodes[: step.nodes.start])
        work.local.names -= {value.name for value in values[step.values]}
        work.origins = list(part.origins[: step.nodes.start])
        work.conversions = set()
        for key in step.reads:
            del work._made[key]
        work.add_node(step.node)
        own = set(range(step.nodes.start, step.nodes.stop))
        return (
            len(work.local.values) == step.values.stop
            and tuple(work.local.values[step.values]) == values[step.values]
            and len(work.local.nodes) == step.nodes.stop
            and all(work.refs[value] == self.refs[value] for value in step.node.outputs)
            and all(work._made.get(key) == self._made[key] for key in step.reads)
            and len(work._made) == len(self._made)
            and work.conversions == part.conversions & own
        )

    def add_given(self) -> None:
        for value in self.graph.values:
            if value.kind is not ValueKind.RESULT:
                self._add_given(value)

    def _add_given(self, value: Value) -> None:
        layout = self.sharding.layout(value)
        if value.kind is ValueKind.BUFFER:
            self.held.update(dict.fromkeys((value.origin, *value.aliases), layout))
        self.refs[value.id] = self.local.add_value(
            value.name,
            self.local.part_type(value.type, layout),
            value.kind,
            origin=value.origin,
            requires_grad=value.requires_grad,
            batch_dim=value.batch_dim,
            aliases=value.aliases,
        )

    def add_node(self, node: Node) -> None:
        self.local.step = len(self.steps) + 1
        first, values, reads = len(self.local.nodes), len(self.local.values), len(self._made)
        self._add_node(node)
        self.steps.append(
            _Step(
                node,
                slice(first, len(self.local.nodes)),
                slice(values, len(self.local.values)),
                tuple(itertools.islice(self._made, reads, None)),
            )
        )

    def _add_node(self, node: Node) -> None:
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
            wanted = self.sharding.crossing_layout(value)
        elif output.kind is OutputKind.BUFFER:
            wanted = self.held.get(output.target, wanted)
        maker = self._maker(value)
        ref = self._read(maker, output.value, wanted, frozenset())
        if output.kind is OutputKind.BOUNDARY and wanted == self.sharding.layout(value):
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
