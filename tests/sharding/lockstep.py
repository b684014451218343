"""All ranks of a mesh in one process: local graphs run node by node on one autograd tape.

Node i of every rank's graph runs before node i + 1 of any. A collective is one autograd function
over the ranks that take part, with the adjoint that the local graphs are promised; so gradients of
all ranks follow from one backward pass, and a wrong adjoint or a missing sum shows as a wrong
gradient.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cutset.compiler.capture.interpret import execute_node
from cutset.compiler.ir.graph import Node, Value
from cutset.compiler.ir.mesh import Layout, Mesh, Partial, Replicate, Shard
from cutset.compiler.ir.ops import Category
from cutset.compiler.ir.types import TensorType

__all__ = ["RankGraph", "assemble", "coordinates", "distribute", "run_lockstep"]


def coordinates(mesh: Mesh) -> list[tuple[int, ...]]:
    """Coordinates of all ranks, in rank order."""
    return list(itertools.product(*(range(axis.size) for axis in mesh.axes)))


# -- one whole tensor <-> its parts ----------------------------------------------------------------


def distribute(whole: Tensor, layout: Layout, mesh: Mesh) -> list[Tensor]:
    """The part of each rank, in rank order; terms of a Partial are random and add up to `whole`."""
    if not layout.placements:
        return [whole]
    placement, size = layout.placements[0], mesh.axes[0].size
    if isinstance(placement, Shard):
        parts = list(torch.chunk(whole, size, placement.dim))
        assert len(parts) == size, "an empty part"
    elif isinstance(placement, Partial):
        assert placement.reduction == "sum"
        terms = [torch.randn_like(whole) for _ in range(size - 1)]
        parts = [*terms, whole - sum(terms, torch.zeros_like(whole))]
    else:
        parts = [whole] * size
    inner = Layout(layout.placements[1:]), Mesh(mesh.axes[1:])
    return [item for part in parts for item in distribute(part, *inner)]


def assemble(parts: Sequence[Tensor], layout: Layout, mesh: Mesh) -> Tensor:
    """Inverse of `distribute`. Raises AssertionError where replicas differ."""
    if not layout.placements:
        return parts[0]
    placement, size = layout.placements[0], mesh.axes[0].size
    inner = Layout(layout.placements[1:]), Mesh(mesh.axes[1:])
    share = len(parts) // size
    pieces = [assemble(parts[i * share : (i + 1) * share], *inner) for i in range(size)]
    if isinstance(placement, Shard):
        return torch.cat(pieces, placement.dim)
    if isinstance(placement, Replicate):
        for piece in pieces[1:]:
            torch.testing.assert_close(
                piece,
                pieces[0],
                rtol=1e-9,
                atol=1e-9,
                equal_nan=True,
                msg=lambda m: f"replicas differ: {m}",
            )
        return pieces[0]
    stacked = torch.stack(pieces)
    if placement.reduction == "sum":
        return stacked.sum(0)
    return stacked.amax(0) if placement.reduction == "max" else stacked.amin(0)


# -- execution -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RankGraph:
    """Values and nodes of one rank (those of a `Graph` or of a `LocalGraph`)."""

    values: Sequence[Value]
    nodes: Sequence[Node]


def run_lockstep(
    graphs: Sequence[RankGraph],
    tensors: Sequence[Mapping[int, Tensor]],
    mesh: Mesh,
    *,
    key: Tensor | None = None,
) -> list[dict[int, Tensor]]:
    """Every value of every rank, by id.

    Args:
        graphs, tensors: in rank order; `tensors` are what the graph does not compute, by value id.
        key: of the random streams.

    Raises:
        AssertionError: the ranks' graphs differ in more than attributes, or a result has not the
            type that its graph says.
    """
    assert len({len(graph.nodes) for graph in graphs}) == 1, "graphs of different length"
    known = [dict(item) for item in tensors]
    for graph, mine in zip(graphs, known, strict=True):
        for number, tensor in mine.items():
            _check_value(graph.values[number], tensor, "input")
    for nodes in zip(*(graph.nodes for graph in graphs), strict=True):
        assert len({node.op.name for node in nodes}) == 1, f"ranks differ at {nodes[0].name}"
        inputs = [
            [mine[value] for value in node.inputs] for node, mine in zip(nodes, known, strict=True)
        ]
        if nodes[0].op.category is Category.COLLECTIVE:
            computed = [[item] for item in _collective(nodes, [item[0] for item in inputs], mesh)]
        else:
            computed = [
                execute_node(node, item, key, torch.device("cpu"))
                for node, item in zip(nodes, inputs, strict=True)
            ]
        for graph, node, mine, results in zip(graphs, nodes, known, computed, strict=True):
            for number, tensor in zip(node.outputs, results, strict=True):
                _check_value(graph.values[number], tensor, node.op.name)
                mine[number] = tensor
    return known


def _check_value(value: Value, tensor: Tensor, where: str) -> None:
    assert TensorType.of(tensor) == value.type, f"{where}: {value.name} is not {value.type}"


# -- collectives -----------------------------------------------------------------------------------


def _collective(nodes: Sequence[Node], inputs: list[Tensor], mesh: Mesh) -> list[Tensor]:
    """Results of one collective on all ranks: one autograd function a group."""
    packet = nodes[0].op.packet
    if packet == "as_partial":
        groups = [[rank] for rank in range(mesh.size)]
    else:
        axis = nodes[0].args[1]
        assert isinstance(axis, str)
        groups = _groups(mesh, axis)
    results: dict[int, Tensor] = {}
    for group in groups:
        arguments = [nodes[rank].args[1:] for rank in group]
        found = _Collective.apply(packet, arguments, *(inputs[rank] for rank in group))
        results.update(zip(group, found, strict=True))
    return [results[rank] for rank in range(mesh.size)]


def _groups(mesh: Mesh, axis: str) -> list[list[int]]:
    """Ranks that share all coordinates but that along `axis`, in order along it."""
    position = [item.name for item in mesh.axes].index(axis)
    table: dict[tuple[int, ...], list[int]] = {}
    for rank, item in enumerate(coordinates(mesh)):
        table.setdefault((*item[:position], *item[position + 1 :]), []).append(rank)
    return list(table.values())


class _Collective(torch.autograd.Function):
    """A collective of one group: (packet, arguments of each rank, operand of each rank)."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, packet: str, arguments: list[tuple[Any, ...]], *operands: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.packet, ctx.arguments = packet, arguments
        results = tuple(item.clone() for item in _FORWARD[packet](arguments, operands))
        if packet == "all_reduce" and arguments[0][1] != "sum":
            ctx.mark_non_differentiable(*results)
        return results

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.packet == "all_reduce" and ctx.arguments[0][1] != "sum":
            return (None, None, *(None for _ in gradients))
        return (None, None, *_BACKWARD[ctx.packet](ctx.arguments, gradients))


Tensors = Sequence[Tensor]


def _total(arguments: Any, items: Tensors) -> Tensors:
    stacked = torch.stack(tuple(items))
    reduction = arguments[0][1] if len(arguments[0]) > 1 else "sum"
    reduce = {"sum": torch.sum, "max": torch.amax, "min": torch.amin}[reduction]
    return [reduce(stacked, 0)] * len(items)


def _same(arguments: Any, items: Tensors) -> Tensors:
    return items


def _as_partial(arguments: Any, items: Tensors) -> Tensors:
    (index,) = arguments[0]
    return [items[0] if index == 0 else torch.zeros_like(items[0])]


def _own_part(arguments: Any, items: Tensors) -> Tensors:
    return [
        torch.split(item, list(sizes), dim)[index]
        for (_, dim, sizes, index, *_), item in zip(arguments, items, strict=True)
    ]


def _gathered(arguments: Any, items: Tensors) -> Tensors:
    _, dim, sizes, *_ = arguments[0]
    assert tuple(item.shape[dim] for item in items) == tuple(sizes)
    return [torch.cat(tuple(items), dim)] * len(items)


def _scattered(arguments: Any, items: Tensors) -> Tensors:
    return _own_part(arguments, [torch.stack(tuple(items)).sum(0)] * len(items))


def _gathered_back(arguments: Any, items: Tensors) -> Tensors:
    return (_scattered if arguments[0][4] else _own_part)(arguments, items)


def _exchanged(arguments: Any, items: Tensors) -> Tensors:
    _, from_dim, from_sizes, to_dim, to_sizes, _ = arguments[0]
    assert tuple(item.shape[from_dim] for item in items) == tuple(from_sizes)
    whole = torch.cat(tuple(items), from_dim)
    return list(torch.split(whole, list(to_sizes), to_dim))


def _exchanged_back(arguments: Any, items: Tensors) -> Tensors:
    turned = [(axis, t, ts, f, fs, i) for axis, f, fs, t, ts, i in arguments]
    return _exchanged(turned, items)


_FORWARD = {
    "all_reduce": _total,
    "sum_gradient": _same,
    "as_partial": _as_partial,
    "shard": _own_part,
    "all_gather": _gathered,
    "reduce_scatter": _scattered,
    "all_to_all": _exchanged,
}
_BACKWARD = {
    "all_reduce": _same,
    "sum_gradient": _total,
    "as_partial": _same,
    "shard": _gathered,
    "all_gather": _gathered_back,
    "reduce_scatter": _gathered,
    "all_to_all": _exchanged_back,
}
