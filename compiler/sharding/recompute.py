"""Which nodes of a rank's local graph backward computes again.

A plan names nodes of the whole graph. In a local graph each stands for what its rule emitted, and
conversions stand before it. Of these are computed again:

* what was emitted for a recomputed node, and conversions that such nodes alone read, but not
  collectives over activations: their results are kept, as meeting other ranks costs more than
  keeping what they say (Korthikanti et al., "Reducing Activation Recomputation in Large Transformer
  Models", 2022, recompute none of them either);
* always, whole parameters gathered from the parts in which they are held, and what is computed
  from parameters alone of those: kept, they would take the memory that holding parts saves (ZeRO
  stage 3; Rajbhandari et al., 2020).
"""

from __future__ import annotations

from collections.abc import Collection

from ..ir.graph import Graph, Mode, ValueKind, users
from ..ir.ops import Category
from .localize import LocalPart

__all__ = ["recomputed_locally"]

_SILENT = ("sum_gradient", "as_partial", "shard")  # collectives that send nothing in forward
_HELD = (ValueKind.PARAMETER, ValueKind.BUFFER, ValueKind.CONSTANT)


def recomputed_locally(part: LocalPart, recomputed: Collection[int]) -> tuple[int, ...]:
    """Nodes of `part.graph` to compute again; `recomputed`: those of the graph it is a part of."""
    graph = part.graph
    if graph.mode is not Mode.TRAIN:
        return ()
    chosen = set(_gathered(graph))
    read_by = users(graph)
    for node in reversed(graph.nodes if recomputed else ()):
        if node.op.category is Category.COLLECTIVE and node.op.packet not in _SILENT:
            continue
        if node.id in part.conversions:
            readers = {user for value in node.outputs for user in read_by[value]}
            wanted = bool(readers) and readers <= chosen
        else:
            wanted = part.origins[node.id] in recomputed
        if wanted:
            chosen.add(node.id)
    return tuple(sorted(chosen))


def _gathered(graph: Graph) -> list[int]:
    """Nodes that make whole what parameters' parts are gathered to."""
    held = {value.id for value in graph.values if value.kind in _HELD}
    whole: set[int] = set()
    nodes = []
    for node in graph.nodes:
        if node.random_draw is not None or not node.inputs or not held.issuperset(node.inputs):
            continue
        held.update(node.outputs)
        if node.op.packet == "all_gather" or not whole.isdisjoint(node.inputs):
            whole.update(node.outputs)
            nodes.append(node.id)
    return nodes
