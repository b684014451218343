"""What of a local graph is measured as one: repeated blocks, what lies between them, or operators.

A part is a run of nodes in program order, so that parts follow each other like stages. Equal parts
have equal digests, of any graph: they call the same operators with the same attributes on the same
relative operands, with the same local types and the same gradients.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from dataclasses import dataclass, replace

from .codegen.cut import cut_stages
from .ir.blocks import find_blocks
from .ir.graph import Graph
from .ir.mesh import Mesh
from .ir.ops import Category
from .ir.plan import Stage
from .ir.program import StageProgram

__all__ = ["PROFILES", "Part", "parts_of"]

PROFILES = ("off", "blocks", "ops")
_LARGEST = 48  # nodes of a module that is measured as one though it is not repeated
_NOT_MEASURED = (Category.VIEW, Category.COLLECTIVE)


@dataclass(frozen=True, slots=True)
class Part:
    """A part, in its first occurrence.

    Args:
        path: of its module.
        nodes: of the graph.
        count: how often it occurs.
        digest: SHA-256 of its content.
        stage: it alone, as a stage.
    """

    path: str
    nodes: tuple[int, ...]
    count: int
    digest: str
    stage: StageProgram


def parts_of(graph: Graph, mesh: Mesh, kind: str) -> tuple[Part, ...]:
    """The distinct parts of `graph`, in its order, without those that neither compute nor copy.

    Args:
        graph: of a whole model or one rank's part of it.
        mesh: the axes that its collectives name.
        kind: `blocks` or `ops`.
    """
    runs = [(str(n.id), (n.id,)) for n in graph.nodes] if kind == "ops" else _runs(graph)
    stages = cut_stages(graph, tuple(Stage(i, (0,), nodes) for i, (_, nodes) in enumerate(runs)))
    axes = tuple((axis.name, tuple(range(axis.size))) for axis in mesh.axes)
    digests = [_digest(stage.graph) for stage in stages]
    counts = Counter(digests)
    parts: dict[str, Part] = {}
    for (path, nodes), stage, digest in zip(runs, stages, digests, strict=True):
        computes = any(node.op.category not in _NOT_MEASURED for node in stage.graph.nodes)
        if digest not in parts and computes:
            path = graph.nodes[nodes[0]].module_path if kind == "ops" else path
            own = replace(stage, axes=axes)
            parts[digest] = Part(path, nodes, counts[digest], digest, own)
    return tuple(parts.values())


def _runs(graph: Graph) -> list[tuple[str, tuple[int, ...]]]:
    """Nodes in a row that belong to one block, or to one module of few nodes; with its path."""
    home = {
        node: instance.path
        for block in find_blocks(graph)
        for instance in block.instances
        for node in instance.nodes
    }
    sizes = Counter(prefix for node in graph.nodes for prefix in _prefixes(node.module_path))

    def label(number: int) -> str:
        if number in home:
            return home[number]
        path = graph.nodes[number].module_path
        return next((item for item in _prefixes(path) if sizes[item] <= _LARGEST), path)

    labels = [label(node.id) for node in graph.nodes]
    runs = itertools.groupby(range(len(labels)), key=labels.__getitem__)
    return [(path, tuple(nodes)) for path, nodes in runs]


def _prefixes(path: str) -> list[str]:
    """The module and those around it, outermost first."""
    names = path.split(".") if path else []
    return [".".join(names[:length]) for length in range(1, len(names) + 1)]


def _digest(graph: Graph) -> str:
    """Of a stage graph, free of names; values are numbered in order of first use."""
    numbers: dict[int, int] = {}
    rows: list[object] = [graph.mode.value]
    for node in graph.nodes:
        random = node.random_draw is not None
        # repr keeps 1, 1.0 and True apart, which compare equal
        rows.append((node.op.name, repr(node.args), repr(node.kwargs), random))
        for index in (*node.inputs, *node.outputs):
            value = graph.values[index]
            if index not in numbers:
                numbers[index] = len(numbers)
                rows.append((value.kind.value, str(value.type), value.requires_grad))
            rows.append(numbers[index])
    for output in graph.outputs:
        rows.append((output.kind.value, numbers.get(output.value)))
    return hashlib.sha256(repr(rows).encode()).hexdigest()
