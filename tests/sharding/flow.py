"""How far a sharding flows through a graph by its rules alone: where must a value be communicated?

A walk in program order gives each node the strategy that needs the fewest bytes to be moved for its
operands, as they lie by then. Taking a part of what is whole moves nothing. No planner: what flows
here flows in every plan that wants it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cutset.compiler.ir.graph import Graph, Node, Value, ValueKind
from cutset.compiler.ir.mesh import Partial, Placement, Replicate, Shard
from cutset.compiler.sharding.rules import strategies_of
from cutset.compiler.sharding.strategy import OpStrategy

__all__ = ["Conversion", "Flow", "flow"]


@dataclass(frozen=True, slots=True)
class Conversion:
    """A node whose operands had to change their layout by communication."""

    node: Node
    had: tuple[Placement | None, ...]
    strategy: OpStrategy

    def __str__(self) -> str:
        had = ",".join(map(str, self.had))
        return (
            f"{self.node.module_path} {self.node.name} ({self.node.op}): {had} => {self.strategy}"
        )


@dataclass(frozen=True, slots=True)
class Flow:
    """Layouts of all values, conversions in between, and the nodes whose sums of terms were made
    whole at once."""

    placements: dict[int, Placement | None]
    strategies: tuple[OpStrategy, ...]
    conversions: tuple[Conversion, ...]
    sums: tuple[Node, ...]


def flow(
    graph: Graph,
    parts: int,
    start: Callable[[Value], Placement | None],
    *,
    sum_at_once: bool = False,
) -> Flow:
    """Walk `graph` over one mesh axis of `parts` ranks.

    Args:
        start: layout of a value that no node makes; None: whichever its first reader wants.
        sum_at_once: terms of a sum are summed where they arise, as in Megatron-LM.
    """
    placements = {v.id: start(v) for v in graph.values if v.kind is not ValueKind.RESULT}
    chosen: list[OpStrategy] = []
    conversions: list[Conversion] = []
    sums: list[Node] = []
    for node in graph.nodes:
        had = tuple(placements[value] for value in node.inputs)
        options = strategies_of(graph, node, parts)
        best = min(options, key=lambda option: _order(graph, node, had, option))
        chosen.append(best)
        if _moved_bytes(graph, node, had, best):
            conversions.append(Conversion(node, had, best))
        for value, placement in zip(node.inputs, best.inputs, strict=True):
            if placements[value] is None:
                placements[value] = placement
        summed = sum_at_once and any(isinstance(item, Partial) for item in best.outputs)
        sums += [node] * summed
        for value, placement in zip(node.outputs, best.outputs, strict=True):
            terms = summed and isinstance(placement, Partial)
            placements[value] = Replicate() if terms else placement
    return Flow(placements, tuple(chosen), tuple(conversions), tuple(sums))


def _order(
    graph: Graph, node: Node, had: tuple[Placement | None, ...], option: OpStrategy
) -> tuple[int, int, int, int]:
    """Least moved, forward and then backward; no sharding out of nothing; most sharded."""
    began = any(isinstance(item, Shard) for item in had)
    shards = sum(isinstance(item, Shard) for item in (*option.inputs, *option.outputs))
    kept = sum(
        graph.values[value].type.num_bytes
        for value, item in zip(node.outputs, option.outputs, strict=True)
        if isinstance(item, Shard)
    )
    taken = sum(
        graph.values[value].type.num_bytes
        for value, have, want in zip(node.inputs, had, option.inputs, strict=True)
        if have != want and have is not None and graph.values[value].requires_grad
    )
    return _moved_bytes(graph, node, had, option), taken, 0 if began else shards, -kept


def _moved_bytes(
    graph: Graph, node: Node, had: tuple[Placement | None, ...], option: OpStrategy
) -> int:
    """Of the operands that are not where the strategy wants them."""
    return sum(
        graph.values[value].type.num_bytes
        for value, have, want in zip(node.inputs, had, option.inputs, strict=True)
        if have != want and isinstance(have, (Shard, Partial))
    )
