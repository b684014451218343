"""Rules of the collectives inside a stage: their axes exist, and parts match their ranks."""

from __future__ import annotations

from typing import Any

from ..graph import Graph, Node
from ..ops import Category
from ..program import Program, StageProgram
from .report import check, fail_node, first_repeated

__all__ = ["verify_axes"]


def verify_axes(program: Program, stage: StageProgram) -> None:
    """Check one stage of one rank. Raises VerificationError."""
    here = f"stage {stage.index} of rank {program.rank}"
    repeated = first_repeated(name for name, _ in stage.axes)
    check(repeated is None, f"it has two axes {repeated!r}", here)
    for name, ranks in stage.axes:
        known = len(set(ranks)) == len(ranks) and set(ranks) <= set(range(program.num_ranks))
        check(known, f"axis {name!r} lists {ranks}, which are not distinct ranks", here)
        check(program.rank in ranks, f"the rank is not on its axis {name!r}: {ranks}", here)
    for node in stage.graph.nodes:
        if node.op.category is Category.COLLECTIVE and node.op.packet != "as_partial":
            _verify_collective(stage.graph, node, dict(stage.axes), program.rank)


def _verify_collective(
    graph: Graph, node: Node, axes: dict[str, tuple[int, ...]], rank: int
) -> None:
    axis, *rest = node.args[1:]
    if not isinstance(axis, str) or axis not in axes:
        fail_node(graph, node, f"the stage has no mesh axis {axis!r}")
    ranks = axes[axis]
    table: dict[str, tuple[list[Any], Any]] = {
        "shard": (rest[1:2], rest[2:3]),
        "all_gather": (rest[1:2], rest[2:3]),
        "reduce_scatter": (rest[1:2], rest[2:3]),
        "all_to_all": ([*rest[1:2], *rest[3:4]], rest[4:5]),
    }
    if node.op.packet not in table:
        return
    splits, index = table[node.op.packet]
    for sizes in splits:
        if len(sizes) != len(ranks) or min(sizes) < 1:
            fail_node(graph, node, f"{len(ranks)} ranks of axis {axis!r} cannot hold parts {sizes}")
    if index != [ranks.index(rank)]:
        fail_node(graph, node, f"rank {rank} has place {ranks.index(rank)} in {ranks}, not {index}")
