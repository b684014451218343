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

__all__ = [
    "MarkedReplay",
    "copy_marked",
    "late_order",
    "mark_like",
    "recompute",
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
    parts: Sequence[set[fx.Node]], inputs: set[fx.Node], copies: Collection[fx.Node]
) -> list[int]:
    """Which weight gradients to compute with the input gradients; their nodes join `inputs`.

    Those that read what is recomputed there, as it would else be held until all input gradients
    are done, or be computed once more; and those that read a gradient which would be held for
    them alone.

    Args:
        parts: per weight gradient, the nodes that it alone needs beside `inputs`.
    """
    chosen: list[int] = []
    shared: set[fx.Node] = set()
    while True:
        found = []
        for index, part in enumerate(parts):
            reads = {s for node in part for s in node.all_input_nodes if s in inputs}
            bases = {_base(node, inputs) for node in reads}
            if index not in chosen and (reads & set(copies) or bases & shared):
                found.append((index, bases.difference(copies)))
        if not found:
            return sorted(chosen)
        for index, bases in found:
            chosen.append(index)
            inputs |= parts[index]
            shared |= bases


def _base(node: fx.Node, among: Collection[fx.Node]) -> fx.Node:
    """What `node` is a view of, `among` those."""
    while _is_view(node) and node.target is not operator.getitem:
        source = node.all_input_nodes[0]
        if source not in among:
            break
        node = source
    return node


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
