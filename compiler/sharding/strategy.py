"""Strategies: the ways to run one node over one mesh axis.

A strategy gives a placement to every tensor that the node reads and makes, in DTensor's
vocabulary. It speaks of *one* axis; over a mesh with several axes a node has one strategy an axis,
and no tensor dim is sharded by two of them.

Gradients follow from placements. The gradient of a `Shard` is sharded alike; that of a `Partial` (a
term of a sum) is replicated, as each term counts fully. A `Replicate` operand of a node that works
on parts gets from each rank the *term* of its gradient that comes from that rank's part, so its
gradient is `Partial`; unless the strategy says in `full_gradients` that each rank computes all of
it. A `Replicate` result expects a replicated gradient. (Megatron-LM's operators f and g are the
conversions that follow from this: Shoeybi et al., 2019.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ..ir.graph import Attribute, Graph, Node, Operand
from ..ir.mesh import Placement, Replicate, chunk_sizes
from ..ir.ops import resolve
from ..ir.types import TensorType

__all__ = ["OpStrategy", "OpView", "StrategyRule", "can_shard", "chunk_sizes", "replicated"]


@dataclass(frozen=True, slots=True)
class OpStrategy:
    """One way to run a node over one mesh axis.

    Args:
        inputs: placement of each entry of `node.inputs` as the node reads it.
        outputs: placement of each entry of `node.outputs` as the node makes it.
        full_gradients: positions in `inputs` of `Replicate` operands whose gradient is complete on
            every rank although the node works on parts.
    """

    inputs: tuple[Placement, ...]
    outputs: tuple[Placement, ...]
    full_gradients: tuple[int, ...] = ()

    @property
    def is_replicated(self) -> bool:
        """Whether every rank of the axis does the whole work."""
        return all(isinstance(item, Replicate) for item in (*self.inputs, *self.outputs))

    def has_partial_gradient(self, position: int) -> bool:
        """Whether the gradient of input `position` comes out as one term a rank."""
        return (
            isinstance(self.inputs[position], Replicate)
            and not self.is_replicated
            and position not in self.full_gradients
        )

    def __str__(self) -> str:
        reads = [
            f"{item}{'!' if i in self.full_gradients else ''}" for i, item in enumerate(self.inputs)
        ]
        return f"{','.join(reads)} -> {','.join(map(str, self.outputs))}"


def replicated(node: Node) -> OpStrategy:
    """Every rank computes the whole node: legal for every operator."""
    return OpStrategy((Replicate(),) * len(node.inputs), (Replicate(),) * len(node.outputs))


@dataclass(frozen=True, slots=True)
class OpView:
    """What a rule reads of a node: types of operands and results, arguments by schema name."""

    graph: Graph
    node: Node

    @property
    def packet(self) -> str:
        return self.node.op.packet

    def input(self, position: int) -> TensorType:
        """Type of entry `position` of `node.inputs`."""
        return self.graph.values[self.node.inputs[position]].type

    def output(self, position: int = 0) -> TensorType:
        return self.graph.values[self.node.outputs[position]].type

    @property
    def inputs(self) -> tuple[TensorType, ...]:
        return tuple(self.graph.values[value].type for value in self.node.inputs)

    @property
    def outputs(self) -> tuple[TensorType, ...]:
        return tuple(self.graph.values[value].type for value in self.node.outputs)

    def argument(self, name: str, default: Attribute = None) -> Attribute:
        """The argument called `name` in the operator's schema, its schema default if not given,
        `default` if the schema has none of that name."""
        for position, item in enumerate(resolve(self.node.op)._schema.arguments):
            if item.name != name:
                continue
            if position < len(self.node.args) and not item.kwarg_only:
                return self.node.args[position]
            given = dict(self.node.kwargs)
            if name in given:
                return given[name]
            value = item.default_value
            return tuple(value) if isinstance(value, list) else value
        return default

    def operand(self, name: str) -> int | None:
        """Position in `node.inputs` of the tensor argument `name`; None if it is not a tensor."""
        found = self.argument(name)
        return found.index if isinstance(found, Operand) else None


StrategyRule = Callable[[OpView, int], Iterator[OpStrategy]]
"""(node, number of parts) -> its strategies without replication. Only legal ones."""


def can_shard(type: TensorType, dim: int, parts: int, *, even: bool = False) -> bool:
    """Whether `dim` can be split so that no part is empty (`even`: and all are equal)."""
    if not 0 <= dim < len(type.shape):
        return False
    size = type.shape[dim]
    return size % parts == 0 and size > 0 if even else min(chunk_sizes(size, parts)) > 0
