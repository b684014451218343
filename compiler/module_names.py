"""Names of the modules in a part of a graph, short enough to print.

`h.0.attn.c_attn`, `h.0.ln_1`, `h.1.mlp`, `ln_f` become `h.0-1, ln_f`: a path is cut after its
first number (the repeated block), and consecutive numbers are joined.
"""

from __future__ import annotations

from .ir.graph import Graph
from .ir.plan import Stage

__all__ = ["block_of", "join_runs", "modules_of_stages"]


def block_of(module_path: str) -> str:
    """`module_path` up to its first component that is a number; all of it if there is none."""
    parts = module_path.split(".")
    for position, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: position + 1])
    return module_path


def modules_of_stages(graph: Graph, stages: tuple[Stage, ...]) -> tuple[tuple[str, ...], ...]:
    """Names of each stage's modules, in the order of the graph.

    A block whose ops are in several stages is marked `(part)`; a module is left out where modules
    inside it are named. Nodes that several stages recompute belong to no stage here.
    """
    homes: dict[int, set[int]] = {}
    for stage in stages:
        for node in stage.nodes:
            homes.setdefault(node, set()).add(stage.index)
    owners: dict[str, set[int]] = {}
    for node, indices in homes.items():
        if len(indices) == 1:
            owners.setdefault(block_of(graph.nodes[node].module_path), set()).update(indices)
    tables = []
    for stage in stages:
        nodes = [graph.nodes[node] for node in stage.nodes if len(homes[node]) == 1]
        blocks = dict.fromkeys(block_of(node.module_path) for node in nodes)
        outer = {block[:position] for block in blocks for position in _dots(block)}
        named = [
            f"{block} (part)" if len(owners[block]) > 1 else block
            for block in blocks
            if block and block not in outer
        ]
        tables.append(tuple(join_runs(named)))
    return tuple(tables)


def _dots(path: str) -> list[int]:
    return [position for position, letter in enumerate(path) if letter == "."]


def join_runs(blocks: list[str]) -> list[str]:
    """`h.0`, `h.1`, `h.2` as `h.0-2`."""
    runs: list[tuple[str, int, int] | str] = []
    for block in blocks:
        head, _, number = block.rpartition(".")
        if not number.isdigit():
            runs.append(block)
            continue
        last = runs[-1] if runs else ""
        if isinstance(last, tuple) and last[0] == head and last[2] + 1 == int(number):
            runs[-1] = (head, last[1], int(number))
        else:
            runs.append((head, int(number), int(number)))
    return [run if isinstance(run, str) else _run_text(*run) for run in runs]


def _run_text(head: str, first: int, last: int) -> str:
    numbers = str(first) if first == last else f"{first}-{last}"
    return f"{head}.{numbers}" if head else numbers
