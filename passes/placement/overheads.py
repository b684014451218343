"""Predicts what a piece costs its device beside its operators, a microbatch.

A piece is one instruction, and so is each message to or from another device. The device works on a
message, too, on either side, for as long as was measured (`Measured.messages`). Every result that
leaves a piece is sent once to each other device that reads it, and received before the first piece
there that does.
"""

from __future__ import annotations

from collections.abc import Sequence

from ...compiler.ir.cluster import Cluster
from ...compiler.ir.graph import Graph
from ...compiler.ir.plan import Stage
from ...compiler.ir.stage_edges import StageEdge
from ..context import Measured

__all__ = ["piece_overheads"]


def piece_overheads(
    graph: Graph,
    cluster: Cluster,
    stages: Sequence[Stage],
    edges: Sequence[StageEdge],
    measured: Measured | None,
) -> tuple[float, ...]:
    """Seconds of every piece beside its operators.

    Args:
        measured: None: instructions take what their type of device says, and messages pass beside
            the work.
    """
    kinds = [cluster.type_of(stage.device) for stage in stages]
    if measured is None:
        instructions = [kind.instruction_seconds for kind in kinds]
    else:
        instructions = [measured.instructions.get(kind.name, 0.0) for kind in kinds]
    costs = list(instructions)
    for (source, value, _), target in _messages(stages, edges).items():
        size = graph.values[value].type.num_bytes
        for end in (source, target):
            costs[end] += instructions[end]
            if measured is not None:
                costs[end] += measured.messages[kinds[end].name].seconds(size)
    return tuple(costs)


def _messages(
    stages: Sequence[Stage], edges: Sequence[StageEdge]
) -> dict[tuple[int, int, int], int]:
    """(piece, value, other device that reads it) -> first piece there that does."""
    found: dict[tuple[int, int, int], int] = {}
    for edge in edges:
        device = stages[edge.target].device
        if device != stages[edge.source].device:
            for value in edge.values:
                key = edge.source, value, device
                found[key] = min(found.get(key, edge.target), edge.target)
    return found
