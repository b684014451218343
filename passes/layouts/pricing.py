"""What nodes and conversions cost on parts of tensors: they are lowered for one rank and priced.

So an option's seconds include every helper and collective that its rule emits, and the price of a
decided plan is that of its local graph. The first rank counts: its parts are the largest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ...compiler.ir.cluster import DeviceType
from ...compiler.ir.graph import Graph, Mode, Node, Output, OutputKind, Value, ValueKind
from ...compiler.ir.mesh import Layout, Mesh, Placement, local_type
from ...compiler.ir.ops import op_named
from ...compiler.ir.plan import DATA
from ...compiler.ir.types import TensorType
from ...compiler.sharding.conversions import can_convert, convert
from ...compiler.sharding.lowering import LocalGraph, Lowering, Ref
from ...compiler.sharding.rules import rule_of
from ...compiler.sharding.strategy import OpStrategy, OpView
from ...cost_models.analysis import batched_values, grows_with
from ...cost_models.collectives import Network
from ...cost_models.corrections import least_of_gradients
from ...cost_models.memory_tables import memory_model
from ...cost_models.node_memory import node_memory
from ...cost_models.ops import NodeCost, gradient_sum_seconds, price
from .facts import GraphFacts

__all__ = ["NodeFigures", "Pricer", "stacked"]

_HELD = (ValueKind.PARAMETER, ValueKind.BUFFER, ValueKind.CONSTANT, ValueKind.INPUT)


@dataclass(frozen=True, slots=True)
class NodeFigures:
    """A node under one strategy an axis, on one rank.

    Args:
        seconds: of forward and backward, without adding up gradients over the users of a value.
        backward_seconds: of backward alone.
        saved_bytes: made for the backward beside operands and results, at the size captured.
        saves_inputs, saves_outputs: which of those the backward reads.
    """

    seconds: float
    backward_seconds: float
    saved_bytes: int
    transient_bytes: int
    saves_inputs: tuple[bool, ...]
    saves_outputs: tuple[bool, ...]


def stacked(by_axis: Sequence[Sequence[Placement]]) -> tuple[Layout, ...]:
    """Layouts of tensors from their placements axis by axis."""
    return tuple(Layout(tuple(column)) for column in zip(*by_axis, strict=True))


@dataclass(slots=True)
class Pricer:
    """Prices for one graph on one mesh; equal questions are answered once.

    Seconds are those of `batch_fraction` times the rows that the graph was captured at; what grows
    with them is what does in a rank's local graph. Bytes are the graph's own. `frames` are what
    `from_graph.py` has stated with these prices.
    """

    facts: GraphFacts
    mesh: Mesh
    device_type: DeviceType
    network: Network
    batch_fraction: float = 1.0
    _kinds: tuple[ValueKind, ...] = ()
    _rows: int = 1  # of the batch on one rank
    _nodes: dict[object, NodeFigures] = field(default_factory=dict)
    _conversions: dict[object, tuple[float, float]] = field(default_factory=dict)
    _looks: dict[int, int] = field(default_factory=dict)
    _numbers: dict[object, int] = field(default_factory=dict)
    frames: dict[object, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """A view of a held tensor counts as that: it is not kept for the backward."""
        values = self.graph.values
        self._kinds = tuple(values[root].kind for root in self.facts.roots)
        parts = self.mesh.axis(DATA).size
        rows = self.facts.rows
        self._rows = math.ceil(rows / parts) if rows >= parts else rows

    @property
    def graph(self) -> Graph:
        return self.facts.graph

    def is_held(self, value: int) -> bool:
        """Whether its storage is there throughout, so that no backward has to keep it."""
        return self._kinds[value] in _HELD

    @property
    def coordinate(self) -> tuple[int, ...]:
        return (0,) * len(self.mesh.axes)

    def local_bytes(self, type: TensorType, layout: Layout) -> int:
        return local_type(type, layout, self.mesh, self.coordinate).num_bytes

    def sum_seconds(self, value: Value, layout: Layout) -> float:
        """Adding one gradient to another one of the same value: at least, as it is corrected like
        the gradients of whichever node reads the value."""
        if self.graph.mode is not Mode.TRAIN:
            return 0.0
        type = local_type(value.type, layout, self.mesh, self.coordinate)
        grows = value.id in self.facts.dependent and grows_with(type, self._rows)
        scale = self.batch_fraction if grows else 1.0
        seconds = gradient_sum_seconds(self.device_type, scale * type.num_bytes)
        corrections = self.device_type.corrections
        return seconds if corrections is None else least_of_gradients(corrections) * seconds

    def _seconds(self, costs: Sequence[NodeCost]) -> tuple[float, float]:
        """Of forward and backward, and of backward alone."""
        forward = sum(cost.forward_seconds for cost in costs)
        if self.graph.mode is not Mode.TRAIN:
            return forward, 0.0
        backward = sum(cost.backward_seconds for cost in costs)
        return forward + backward, backward

    def _price(self, part: Graph, operands: Sequence[int]) -> tuple[NodeCost, ...]:
        """`operands`: what the first values of `part` are parts of."""
        given = {i for i, value in enumerate(operands) if value in self.facts.dependent}
        return price(
            part,
            self.device_type,
            batch_fraction=self.batch_fraction,
            network=self.network,
            batched=batched_values(part, self._rows, given),
            ahead=True,
        )

    # -- nodes -------------------------------------------------------------------------------------

    def node(self, node: Node, strategies: tuple[OpStrategy, ...]) -> NodeFigures:
        """Figures of `node` under `strategies`, one an axis."""
        kinds = tuple(map(self._operand_kind, node.inputs))
        grows = tuple(value in self.facts.dependent for value in node.inputs)
        key = (self.facts.signatures[node.id], kinds, grows, strategies)
        if key not in self._nodes:
            self._nodes[key] = self._price_node(node, strategies)
        return self._nodes[key]

    def _price_node(self, node: Node, strategies: tuple[OpStrategy, ...]) -> NodeFigures:
        part, results = self._lower(node, strategies)
        count = len(node.inputs)
        seconds, backward_seconds = self._seconds(self._price(part, node.inputs))
        trains = part.mode is Mode.TRAIN
        model = memory_model(
            part, batch_fraction=self.batch_fraction, backend=self.device_type.backend
        )
        steps = model.steps(range(len(part.nodes)))
        transient = [entry.transient_bytes for entry in node_memory(model, steps)]
        made = {ref.id for ref in results}
        others = sum(
            size
            for storage, size in steps.saved.items()
            if storage >= count and storage not in made
        )
        return NodeFigures(
            seconds=seconds,
            backward_seconds=backward_seconds,
            saved_bytes=math.ceil(others / self.batch_fraction) if trains else 0,
            transient_bytes=max(transient, default=0),
            saves_inputs=tuple(trains and i in steps.saved for i in range(count)),
            saves_outputs=tuple(
                trains and ref.id in steps.saved and ref.id >= count for ref in results
            ),
        )

    def _lower(
        self, node: Node, strategies: tuple[OpStrategy, ...]
    ) -> tuple[Graph, tuple[Ref, ...]]:
        """The local graph of `node` alone; its first values are the operands."""
        view = OpView(self.graph, node)
        local = LocalGraph(self.mesh, self.coordinate)
        input_layouts = stacked([strategy.inputs for strategy in strategies])
        refs = []
        for value, layout in zip(node.inputs, input_layouts, strict=True):
            refs.append(self._operand(local, self.graph.values[value], layout))
        lowering = Lowering(
            view=view,
            local=local,
            inputs=tuple(refs),
            input_layouts=input_layouts,
            output_layouts=stacked([strategy.outputs for strategy in strategies]),
        )
        rule = rule_of(node)
        whole = rule is None or all(strategy.is_replicated for strategy in strategies)
        results = lowering.same() if whole or rule is None else tuple(rule.lower(lowering))
        outputs = tuple(Output(OutputKind.BOUNDARY, ref.id) for ref in results)
        return self._finish(local, outputs), results

    def _operand(self, local: LocalGraph, value: Value, layout: Layout) -> Ref:
        type = local_type(value.type, layout, self.mesh, self.coordinate)
        kind = self._operand_kind(value.id)
        grows = kind is ValueKind.INPUT and value.id in self.facts.batched
        return local.add_value(
            value.name,
            type,
            kind,
            requires_grad=value.requires_grad,
            batch_dim=0 if grows else None,
        )

    def _operand_kind(self, value: int) -> ValueKind:
        """What a value is to the one node that is priced."""
        if value in self.facts.weight_like:
            return ValueKind.PARAMETER
        return self._kinds[value] if self.is_held(value) else ValueKind.BOUNDARY

    def _finish(self, local: LocalGraph, outputs: tuple[Output, ...]) -> Graph:
        return Graph("part", self.graph.mode, tuple(local.values), tuple(local.nodes), (), outputs)

    # -- conversions -------------------------------------------------------------------------------

    def conversion(
        self, value: Value, made: Layout, wanted: Layout, partial: frozenset[int]
    ) -> tuple[float, float]:
        """Seconds of bringing `value` from one layout to another, gradient included, and of the
        gradient alone; infinite if there is no way. `partial`: axes on which each rank has a term
        of the gradient."""
        key = (self._look(value), made, wanted, partial)
        if key not in self._conversions:
            self._conversions[key] = self._price_conversion(value, made, wanted, partial)
        return self._conversions[key]

    def _look(self, value: Value) -> int:
        """A number for all that a price depends on; it is quicker to look up."""
        if value.id not in self._looks:
            kind = self._operand_kind(value.id), value.id in self.facts.dependent
            look = value.type, value.requires_grad, kind
            self._looks[value.id] = self._numbers.setdefault(look, len(self._numbers))
        return self._looks[value.id]

    def _price_conversion(
        self, value: Value, made: Layout, wanted: Layout, partial: frozenset[int]
    ) -> tuple[float, float]:
        pairs = zip(made.placements, wanted.placements, strict=True)
        if not all(can_convert(old, new) for old, new in pairs):
            return math.inf, 0.0
        local = LocalGraph(self.mesh, self.coordinate)
        ref = self._operand(local, value, made)
        convert(
            local,
            ref,
            value.type.shape,
            made=made,
            wanted=wanted,
            partial=partial if value.requires_grad else frozenset(),
            like=_CONVERSION,
        )
        return self._seconds(self._price(self._finish(local, ()), (value.id,)))


_CONVERSION = Node(0, "conversion", op_named("aten.alias.default"), (), (), (), ())
