"""Recomputation: results of the forward that backward computes again instead of keeping them.

A generated stage function says which they are by `with recompute():` around the calls that make
them. While the stage is traced that marks nodes of the joint graph. `copy_marked` then gives
backward copies of the marked nodes that it reads, and of the marked nodes that those read in turn,
down to arguments and to results that are kept (Chen et al., "Training Deep Nets with Sublinear
Memory Cost", 2016). Random numbers follow from keys, which are arguments, so copies are bit-equal.

A view of a marked result counts as marked: kept, it would keep the storage.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from ..compiler.ir.graph import Graph, ValueKind

__all__ = [
    "MarkedReplay",
    "copy_marked",
    "late_order",
    "mark_like",
    "read_together",
    "recompute",
    "rerun_nodes",
    "weights_with_inputs",
]

_MARK = "cutset_recompute"


@contextlib.contextmanager
def recompute() -> Iterator[None]:
    """Mark what is traced inside; no effect on a stage function that merely runs."""
    mode = get_proxy_mode()
    if mode is None:
        yield
        return
    nodes = mode.tracer.graph.nodes
    last = next(iter(reversed(nodes)), None)
    yield
    for node in reversed(nodes):
        if node is last:
            break
        node.meta[_MARK] = True


def mark_like(node: fx.Node, other: fx.Node) -> None:
    """Mark `node`, which computes a part of `other`, if that is marked."""
    if other.meta.get(_MARK):
        node.meta[_MARK] = True


class MarkedReplay(fx.Interpreter):
    """Runs a traced graph such that a trace of the run has the same marks."""

    def run_node(self, n: fx.Node) -> Any:
        with recompute() if n.meta.get(_MARK) else contextlib.nullcontext():
            return super().run_node(n)


def _is_view(node: fx.Node) -> bool:
    """Whether the first result of `node` is, or may be, a view of its first operand."""
    if node.target is operator.getitem:
        return True
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    schema = node.target._schema
    return bool(schema.returns) and schema.returns[0].alias_info is not None


def copy_marked(graph: fx.Graph, forward: Collection[fx.Node]) -> set[fx.Node]:
    """Let the nodes outside `forward` read copies of its marked nodes; returns the copies.

    Each copy stands before its first reader.
    """
    order = {node: position for position, node in enumerate(graph.nodes)}
    again: set[fx.Node] = set()
    for node in order:
        if node in forward and (
            node.meta.get(_MARK) or (_is_view(node) and node.all_input_nodes[0] in again)
        ):
            again.add(node)
    copies: dict[fx.Node, fx.Node] = {}
    for reader in order:
        if not again or reader in forward or reader.op == "output":
            continue
        read = again.intersection(reader.all_input_nodes)
        fresh = _ancestors(read, lambda node: node in again and node not in copies)
        with graph.inserting_before(reader):
            for node in sorted(fresh, key=order.__getitem__):
                copies[node] = graph.node_copy(node, lambda source: copies.get(source, source))
        for source in read:
            reader.replace_input_with(source, copies[source])
    return set(copies.values())


def late_order(nodes: Iterable[fx.Node], tangents: Iterable[fx.Node]) -> list[fx.Node]:
    """`nodes` in their order, but what depends on no tangent right before its first reader.

    So backward recomputes block by block, as it comes to each.
    """
    nodes = list(nodes)
    dependent = _descendants(tangents)
    order = {node: position for position, node in enumerate(nodes)}
    placed: dict[fx.Node, None] = {}
    for node in nodes:
        if node in dependent:
            late = _ancestors(
                node.all_input_nodes,
                lambda source: source in order and source not in dependent and source not in placed,
            )
            placed.update(dict.fromkeys(sorted(late, key=order.__getitem__)))
            placed[node] = None
    placed.update(dict.fromkeys(nodes))
    return list(placed)


def weights_with_inputs(
    parts: Sequence[set[fx.Node]],
    inputs: set[fx.Node],
    again: Collection[fx.Node],
    groups: Collection[frozenset[int]],
) -> list[int]:
    """Which weight gradients to compute with the input gradients; their nodes join `inputs`.

    Those that read what is recomputed there, as it would else be held until all input gradients
    are done, or be computed once more; and with each all of its group, for which the gradient that
    both read would else be held. What depends on what decides, which is the same on all ranks.

    Args:
        parts: per weight gradient, the nodes that it alone needs beside `inputs`.
        again: what is recomputed.
        groups: of weight gradients that read the same gradient.
    """
    chosen: set[int] = set()
    while True:
        found = {
            index
            for index, part in enumerate(parts)
            if any(s in again and s in inputs for node in part for s in node.all_input_nodes)
        }
        for group in groups:
            if not group.isdisjoint(found):
                found |= {index for index in group if parts[index]}
        found -= chosen
        if not found:
            return sorted(chosen)
        chosen |= found
        inputs.update(*(parts[index] for index in found))


def read_together(graph: Graph) -> list[frozenset[int]]:
    """Groups of parameters, as value ids, of which one node reads one or what is computed from
    it alone, beside an activation: one gradient of its result makes all of their gradients."""
    held = (ValueKind.PARAMETER, ValueKind.BUFFER, ValueKind.CONSTANT)
    sources = {
        value.id: frozenset([value.id] if value.kind is ValueKind.PARAMETER else ())
        for value in graph.values
        if value.kind in held
    }
    groups = []
    for node in graph.nodes:
        found = frozenset().union(*(sources.get(value, frozenset()) for value in node.inputs))
        if all(value in sources for value in node.inputs):
            sources.update(dict.fromkeys(node.outputs, found))
        elif len(found) > 1:
            groups.append(found)
    return groups


def rerun_nodes(copies: Iterable[fx.Node], tangents: Iterable[fx.Node]) -> set[fx.Node]:
    """`copies` and what is computed from them without any tangent."""
    return _descendants(copies) - _descendants(tangents)


def _descendants(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """`nodes` and all that depends on them."""
    found: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(node.users)
    return found


def _ancestors(nodes: Iterable[fx.Node], wanted: Callable[[fx.Node], bool]) -> set[fx.Node]:
    """Those of `nodes` and of what they read, in turn, that are `wanted`."""
    found: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in found and wanted(node):
            found.add(node)
            stack.extend(node.all_input_nodes)
    return found
