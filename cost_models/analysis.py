"""What follows from a forward graph alone and several cost models need.

* Batch dependence: which values grow with the number of rows of a microbatch.
* Weight-like values: those computed from parameters alone (a transposed or cast weight). Their
  adjoints are weight gradients; all other adjoints are input gradients.
* Storages: views share the storage of what they view, so memory is counted by storage. Strides
  of views are found by running the view on tensors without data (`meta`).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass

import torch

from ..compiler.ir.graph import Attribute, Graph, Node, Operand, Value, ValueKind, operands
from ..compiler.ir.memo import once_per_object
from ..compiler.ir.ops import Category, resolve
from ..compiler.ir.types import TensorType

__all__ = [
    "Storages",
    "batch_rows",
    "batch_values",
    "batched_values",
    "dependent_values",
    "find_storages",
    "grows_with",
    "weight_like_values",
]


def batch_rows(graph: Graph) -> int:
    """Rows of the batch that `graph` was captured at; 1 when no input is batched."""
    for index in graph.inputs:
        value = graph.values[index]
        if value.batch_dim is not None:
            return value.type.shape[value.batch_dim]
    return 1


@once_per_object
def batch_values(graph: Graph) -> frozenset[int]:
    """Ids of the values whose size is proportional to the rows of the microbatch.

    A value grows if its size is a multiple of the rows and it is computed from one that depends on
    a batched input, or if it comes from nowhere (a factory) with the rows as its first dim. A
    stage graph's boundary values count as batched under the same condition.
    """
    return batched_values(graph, batch_rows(graph), _given_dependent(graph))


def batched_values(graph: Graph, rows: int, given: Collection[int]) -> frozenset[int]:
    """As `batch_values`, of a graph of which it is known what depends on a batch of `rows`.

    Args:
        given: those of its values that no node makes and that depend on a batched input.
    """
    dependent = _dependent(graph, rows, given)
    return frozenset(index for index in dependent if grows_with(graph.values[index].type, rows))


@once_per_object
def dependent_values(graph: Graph) -> frozenset[int]:
    """Ids of the values that are computed from a batched input, whether they grow with it or not,
    and of factories that make something of its rows."""
    return _dependent(graph, batch_rows(graph), _given_dependent(graph))


def _given_dependent(graph: Graph) -> set[int]:
    return {
        value.id
        for value in graph.values
        if value.kind is ValueKind.BOUNDARY
        or (value.kind is ValueKind.INPUT and value.batch_dim is not None)
    }


def _dependent(graph: Graph, rows: int, given: Collection[int]) -> frozenset[int]:
    dependent = set(given)
    for node in graph.nodes:
        reached = any(index in dependent for index in node.inputs)
        for index in node.outputs:
            shape = graph.values[index].type.shape
            if reached or (not node.inputs and rows > 1 and shape[:1] == (rows,)):
                dependent.add(index)
    return frozenset(dependent)


def grows_with(type: TensorType, rows: int) -> bool:
    """Whether a value of `type` that depends on a batch of `rows` grows with it."""
    return bool(type.shape) and type.numel >= rows and type.numel % rows == 0


@once_per_object
def weight_like_values(graph: Graph) -> frozenset[int]:
    """Ids of values that require a gradient and are computed without any input of the graph."""
    fed: set[int] = {
        value.id for value in graph.values if value.kind in (ValueKind.INPUT, ValueKind.BOUNDARY)
    }
    weights: set[int] = {value.id for value in graph.values_of(ValueKind.PARAMETER)}
    for node in graph.nodes:
        if any(index in fed for index in node.inputs) or node.op.random:
            fed.update(node.outputs)
        elif any(index in weights for index in node.inputs):
            weights.update(index for index in node.outputs if graph.values[index].requires_grad)
    return frozenset(index for index in weights if graph.values[index].requires_grad)


_COLLECTIVE_VIEWS = ("cutset.sum_gradient.default", "cutset.shard.default")
_PERMUTES = ("transpose", "permute", "t", "movedim", "swapaxes", "swapdims")


@dataclass(frozen=True, slots=True)
class Storages:
    """Storage of every value of a graph.

    Args:
        base: value id -> id of the value that it is a view of (itself unless it is a view).
        root: value id -> id of the value that owns its storage, at the end of the bases.
        strides: value id -> strides in elements.
        scattered: values whose gradient is not contiguous when it arrives, because an op puts
            their dims in another order or makes them part of a larger tensor.
    """

    base: tuple[int, ...]
    root: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    scattered: frozenset[int]

    def stands_contiguous(self, value: Value) -> bool:
        """Whether `value` lies in memory as a tensor of its own would."""
        pairs = zip(value.type.shape, self.strides[value.id], strict=True)
        dense = _dense_strides(value.type.shape)
        return all(n == 1 or s == d for (n, s), d in zip(pairs, dense, strict=True))

    def folds(self, value: Value, rows: int) -> bool:
        """Whether all dims but the last `rows` can be viewed as one (as batched products do)."""
        shape, strides = value.type.shape, self.strides[value.id]
        # with rows = 1 the last dim must be contiguous too, unless there are two dims at most
        if rows == 1 and len(shape) > 2 and strides[-1] != 1:
            return False
        leading = [(n, s) for n, s in zip(shape[:-rows], strides[:-rows], strict=True) if n != 1]
        return all(
            stride == inner[0] * inner[1]
            for (_, stride), inner in zip(leading, leading[1:], strict=False)
        )


def find_storages(graph: Graph, nodes: Iterable[int] | None = None) -> Storages:
    """Storages of all values, see `Storages`.

    Args:
        nodes: only these nodes are followed (None: all); values of others stand alone and are
            contiguous, as boundary values of a stage are.
    """
    return _all_storages(graph) if nodes is None else _storages(graph, sorted(nodes))


@once_per_object
def _all_storages(graph: Graph) -> Storages:
    return _storages(graph, range(len(graph.nodes)))


def _storages(graph: Graph, nodes: Iterable[int]) -> Storages:
    count = len(graph.values)
    base, root = list(range(count)), list(range(count))
    strides = [_dense_strides(value.type.shape) for value in graph.values]
    chosen = [graph.nodes[index] for index in nodes]
    for node in chosen:
        if node.op.packet == "broadcast_tensors":
            for index, operand in zip(node.outputs, node.inputs, strict=False):
                base[index], root[index] = operand, root[operand]
        elif node.op.name in _COLLECTIVE_VIEWS:
            index, operand = node.outputs[0], node.inputs[0]
            base[index], root[index], strides[index] = operand, root[operand], strides[operand]
        elif (node.op.category is Category.VIEW or node.op.packet == "unfold") and node.inputs:
            _follow_view(graph, node, base, root, strides)
        elif node.op.category is Category.ATTENTION and node.random_draw is None:
            query = node.inputs[0]
            if _is_dense(graph.values[query].type.shape, strides[query]):
                strides[node.outputs[0]] = _dense_like(
                    graph.values[node.outputs[0]].type.shape, strides[query]
                )
        elif node.op.category is Category.ELEMENTWISE:
            _keep_layout(graph, node, strides)
    scattered = {node.inputs[0] for node in chosen if node.op.packet in _PERMUTES}
    scattered.update(i for node in chosen if node.op.packet == "cat" for i in node.inputs)
    return Storages(tuple(base), tuple(root), tuple(strides), frozenset(scattered))


def _follow_view(
    graph: Graph,
    node: Node,
    base: list[int],
    root: list[int],
    strides: list[tuple[int, ...]],
) -> None:
    viewed = node.inputs[0]
    layouts = _view_strides(graph, node, strides[viewed])
    for position, index in enumerate(node.outputs):
        layout = layouts[position] if layouts is not None else None
        if layout is not None:
            base[index], root[index] = viewed, root[viewed]
            strides[index] = layout


def _view_strides(
    graph: Graph, node: Node, base_strides: tuple[int, ...]
) -> list[tuple[int, ...] | None] | None:
    """Strides of the views that `node` makes, None where it has to copy."""
    base = graph.values[node.inputs[0]].type
    span = 1 + sum((n - 1) * s for n, s in zip(base.shape, base_strides, strict=True) if n > 0)
    storage = torch.empty(max(span, 0), dtype=base.dtype, device="meta")
    tensor = storage.as_strided(base.shape, base_strides)

    def fill(item: Attribute) -> object:
        if isinstance(item, Operand):
            other = graph.values[node.inputs[item.index]].type
            if item.index == 0:
                return tensor
            return torch.empty(other.shape, dtype=other.dtype, device="meta")
        if isinstance(item, tuple):
            return [fill(part) for part in item]
        return item

    if not any(operand.index == 0 for operand in operands(node.args)):
        return None
    try:
        kwargs = {key: fill(item) for key, item in node.kwargs}
        result = resolve(node.op)(*[fill(item) for item in node.args], **kwargs)
    except (RuntimeError, TypeError, ValueError):
        return None  # illegal on these strides: functional graphs then hold an explicit copy
    results = [result] if isinstance(result, torch.Tensor) else list(result)
    return [tuple(out.stride()) if out._is_view() or out is tensor else None for out in results]


def _keep_layout(graph: Graph, node: Node, strides: list[tuple[int, ...]]) -> None:
    """Elementwise ops keep the order of dims in memory of their first operand of full size."""
    for index in node.outputs:
        shape = graph.values[index].type.shape
        for operand in node.inputs:
            same = graph.values[operand].type.shape == shape
            if same and _is_dense(shape, strides[operand]):
                strides[index] = strides[operand]
                break


def _dense_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides = [1] * len(shape)
    for dim in reversed(range(len(shape) - 1)):
        strides[dim] = strides[dim + 1] * max(shape[dim + 1], 1)
    return tuple(strides)


def _dense_like(shape: tuple[int, ...], order: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a dense tensor whose dims lie in memory as those with strides `order`."""
    strides = [1] * len(shape)
    expected = 1
    for dim in sorted(range(len(shape)), key=lambda dim: (order[dim], -dim)):
        strides[dim] = expected
        expected *= max(shape[dim], 1)
    return tuple(strides)


def _is_dense(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether the elements fill memory without gap or overlap, in any order of dims."""
    order = sorted((stride, size) for size, stride in zip(shape, strides, strict=True) if size != 1)
    expected = 1
    for stride, size in order:
        if stride != expected:
            return False
        expected *= size
    return expected == math.prod(shape)
