"""Repeated blocks: parts of a graph that compute the same thing on other weights.

A block is what one module and everything below it contributed to the graph. Two blocks are equal
when their nodes, in order, call the same operators with the same attributes on the same relative
operands, where operands from outside count by kind, type and order of first use. Whatever
is expensive (enumeration, solving, profiling, compiling) is done once a distinct block: the 80
layers of a 70B transformer are one.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from .graph import Graph, Node, Value, ValueKind

__all__ = ["Block", "BlockInstance", "find_blocks"]


@dataclass(frozen=True, slots=True)
class BlockInstance:
    """One occurrence: module path and node ids, ascending."""

    path: str
    nodes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Block:
    """A repeated part.

    Args:
        digest: SHA-256 of its content; equal for equal blocks of any graph.
        instances: where it occurs, at least two, in graph order.
    """

    digest: str
    instances: tuple[BlockInstance, ...]


def find_blocks(graph: Graph) -> tuple[Block, ...]:
    """The largest repeated blocks, in graph order; none lies within another."""
    subtrees = _subtrees(graph)
    table = _Contents(graph)
    groups: dict[object, list[str]] = {}
    for path, nodes in subtrees.items():
        groups.setdefault(table.content(nodes), []).append(path)
    for paths in groups.values():
        paths.sort(key=lambda path: subtrees[path])
    repeated = {path: paths for paths in groups.values() if len(paths) > 1 for path in paths}
    blocks: list[Block] = []
    covered: set[str] = set()
    for path in sorted(subtrees, key=lambda path: (-len(subtrees[path]), subtrees[path])):
        if path in covered or path not in repeated or _has_ancestor(path, covered):
            continue
        found = [item for item in repeated[path] if not _has_ancestor(item, covered)]
        covered.update(repeated[path])
        if len(found) > 1:
            instances = tuple(BlockInstance(item, subtrees[item]) for item in found)
            digest = hashlib.sha256(repr(table.content(subtrees[path])).encode()).hexdigest()
            blocks.append(Block(digest, instances))
    return tuple(sorted(blocks, key=lambda block: block.instances[0].nodes))


def _has_ancestor(path: str, paths: set[str]) -> bool:
    parts = path.split(".")
    return any(".".join(parts[:length]) in paths for length in range(1, len(parts)))


def _subtrees(graph: Graph) -> dict[str, tuple[int, ...]]:
    """Module path -> nodes of the module and of all modules below it.

    Of a module that only calls another one, the outer is taken.
    """
    table: dict[str, list[int]] = {}
    for node in graph.nodes:
        parts = node.module_path.split(".") if node.module_path else []
        for length in range(1, len(parts) + 1):
            table.setdefault(".".join(parts[:length]), []).append(node.id)
    outermost: dict[tuple[int, ...], str] = {}
    for path in sorted(table, key=lambda path: path.count(".")):
        outermost.setdefault(tuple(table[path]), path)
    return {path: nodes for nodes, path in outermost.items()}


def _outside(value: Value) -> tuple[str, str, bool]:
    """What counts of a value from outside: a block's place in the chain does not."""
    if value.kind in (ValueKind.PARAMETER, ValueKind.BUFFER, ValueKind.CONSTANT):
        return (value.kind.value, str(value.type), value.requires_grad)
    return ("activation", str(value.type), False)


class _Contents:
    """Contents of node sets, free of names and of the place in the graph."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._calls = [self._call(node) for node in graph.nodes]

    def _call(self, node: Node) -> tuple[object, ...]:
        types = tuple(str(self._graph.values[value].type) for value in node.outputs)
        # repr keeps 1, 1.0 and True apart, which compare equal
        return (node.op.name, repr(node.args), repr(node.kwargs), types)

    def content(self, nodes: tuple[int, ...]) -> tuple[object, ...]:
        """A hashable that is equal for equal blocks."""
        numbers: dict[int, int] = {}
        outside: list[tuple[str, str, bool]] = []
        rows: list[object] = []
        inside = {value for node in nodes for value in self._graph.nodes[node].outputs}
        for node in nodes:
            operands = []
            for value in self._graph.nodes[node].inputs:
                if value not in numbers:
                    assert value not in inside, "nodes are in topological order"
                    numbers[value] = -1 - len(outside)
                    found = self._graph.values[value]
                    outside.append(_outside(found))
                operands.append(numbers[value])
            for value in self._graph.nodes[node].outputs:
                numbers[value] = len(numbers)
            rows.append((self._calls[node], tuple(operands)))
        return (tuple(rows), tuple(outside))
