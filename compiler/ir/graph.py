"""The forward graph of a model: a static single-assignment DAG of ATen ops on typed values.

A `Graph` is the *forward* computation only. Planning, sharding and costs live on it; backward is
derived from it, per stage, on the rank that runs it. The same type describes a whole model (whose
inputs are the user's) and one stage of it (which also has `BOUNDARY` values, received from other
stages, and `BOUNDARY` outputs, sent to them).

Ids are dense: `graph.values[i].id == i` and `graph.nodes[i].id == i`; nodes are in a topological
order which is the order of the user's program.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from .memo import once_per_object
from .ops import Op
from .types import TensorType

__all__ = [
    "Attribute",
    "Graph",
    "Mode",
    "Node",
    "Operand",
    "Output",
    "OutputKind",
    "Value",
    "ValueKind",
    "operands",
    "producers",
    "users",
]


class Mode(enum.Enum):
    """Whether a graph, plan or program trains or only infers."""

    TRAIN = "train"
    INFER = "infer"


class ValueKind(enum.Enum):
    INPUT = "input"  # a tensor the user passes on every call
    PARAMETER = "parameter"
    BUFFER = "buffer"
    CONSTANT = "constant"  # a tensor the model closes over
    BOUNDARY = "boundary"  # received from another stage (stage graphs only)
    RESULT = "result"  # output of a node


@dataclass(frozen=True, slots=True)
class Value:
    """One tensor.

    Args:
        id: index into `Graph.values`.
        name: unique within the graph and stable across stages of one model.
        type: shape and dtype.
        kind: where it comes from.
        origin: for INPUT its path in the call (`args[0]`, `kwargs.ids`, `targets[0]`), for
            PARAMETER / BUFFER / CONSTANT its fully qualified name; empty for RESULT.
        requires_grad: whether the loss may have a gradient with respect to it.
        batch_dim: the dim split into microbatches (INPUT), or None.
        aliases: further names of a tied parameter or buffer.
    """

    id: int
    name: str
    type: TensorType
    kind: ValueKind
    origin: str = ""
    requires_grad: bool = False
    batch_dim: int | None = None
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Operand:
    """Position in `Node.inputs`, standing for that tensor inside `Node.args` / `Node.kwargs`."""

    index: int


Attribute = (
    Operand
    | int
    | float
    | bool
    | str
    | None
    | torch.dtype
    | torch.device
    | torch.layout
    | torch.memory_format
    | tuple["Attribute", ...]
)


@dataclass(frozen=True, slots=True)
class Node:
    """One operator call `outputs = op(*args, **kwargs)`.

    Args:
        id: index into `Graph.nodes`.
        name: unique within the graph.
        op: entry of the op table.
        inputs: value ids, in order of first appearance in args then kwargs.
        args, kwargs: the call, with `Operand(i)` in place of `inputs[i]`.
        outputs: value ids of the results, one per tensor that the op returns.
        module_path: path of the innermost module that issued the call (`model.layers.3.mlp`).
        source: the user's line, `file.py:123`, or empty.
        random_draw: for ops that consume randomness, the ordinal of their first draw in the
            forward pass. A draw's stream follows from (seed, step, microbatch, ordinal) and so
            from neither rank nor plan. None for deterministic ops.
    """

    id: int
    name: str
    op: Op
    inputs: tuple[int, ...]
    args: tuple[Attribute, ...]
    kwargs: tuple[tuple[str, Attribute], ...]
    outputs: tuple[int, ...]
    module_path: str = ""
    source: str = ""
    random_draw: int | None = None


class OutputKind(enum.Enum):
    LOSS = "loss"  # the scalar that is differentiated
    USER = "user"  # part of the value that the model returns
    BUFFER = "buffer"  # new content of the buffer named by `target`
    BOUNDARY = "boundary"  # sent to other stages (stage graphs only)


@dataclass(frozen=True, slots=True)
class Output:
    """One result of a graph.

    Args:
        kind: what becomes of it.
        value: id of the value returned.
        target: USER: position among the flattened outputs, as text; BUFFER: the buffer's name.
        batch_dim: dim along which microbatches are concatenated; None: not batched (a scalar is
            averaged over microbatches, anything else is taken from the last one).
    """

    kind: OutputKind
    value: int
    target: str = ""
    batch_dim: int | None = None


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Graph:
    """See the module docstring. `inputs` are the value ids of kind INPUT in call order."""

    name: str
    mode: Mode
    values: tuple[Value, ...]
    nodes: tuple[Node, ...]
    inputs: tuple[int, ...]
    outputs: tuple[Output, ...]

    def values_of(self, kind: ValueKind) -> tuple[Value, ...]:
        """All values of one kind, in id order."""
        return tuple(value for value in self.values if value.kind is kind)

    def by_name(self) -> dict[str, Value]:
        """Values by name."""
        return {value.name: value for value in self.values}

    def outputs_of(self, kind: OutputKind) -> tuple[Output, ...]:
        return tuple(output for output in self.outputs if output.kind is kind)

    def __str__(self) -> str:
        from .text import print_graph

        return print_graph(self)


def operands(attributes: object) -> Iterator[Operand]:
    """All `Operand`s inside nested attributes, in order."""
    if isinstance(attributes, Operand):
        yield attributes
    elif isinstance(attributes, tuple):
        for item in attributes:
            yield from operands(item)


@once_per_object
def producers(graph: Graph) -> Mapping[int, int]:
    """Value id -> id of the node that computes it, for RESULT values."""
    return {value: node.id for node in graph.nodes for value in node.outputs}


@once_per_object
def users(graph: Graph) -> Mapping[int, tuple[int, ...]]:
    """Value id -> ids of the nodes that read it, ascending; every value has an entry."""
    table: dict[int, list[int]] = {value.id: [] for value in graph.values}
    for node in graph.nodes:
        for value in dict.fromkeys(node.inputs):
            table[value].append(node.id)
    return {value: tuple(nodes) for value, nodes in table.items()}
