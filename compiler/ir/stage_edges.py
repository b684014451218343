"""Which stages of a plan exchange values."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from .graph import Graph, producers
from .plan import Plan, Stage

__all__ = ["StageEdge", "schedule_edges", "stage_edges"]


@dataclass(frozen=True, slots=True)
class StageEdge:
    """Values that one stage computes and another reads.

    Args:
        values: ids, ascending.
    """

    source: int
    target: int
    values: tuple[int, ...]


def stage_edges(graph: Graph, stages: Sequence[Stage]) -> tuple[StageEdge, ...]:
    """Which stages read what of which others; a value comes from the first that computes it."""
    made_by = producers(graph)
    first: dict[int, int] = {}
    for stage in stages:
        for node in stage.nodes:
            first.setdefault(node, stage.index)
    found: dict[tuple[int, int], set[int]] = defaultdict(set)
    for stage in stages:
        own = set(stage.nodes)
        for node in stage.nodes:
            for value in graph.nodes[node].inputs:
                source = made_by.get(value)
                if source is not None and source not in own:
                    found[first[source], stage.index].add(value)
    return tuple(
        StageEdge(source, target, tuple(sorted(values)))
        for (source, target), values in sorted(found.items())
    )


def schedule_edges(plan: Plan, graph: Graph | None) -> tuple[tuple[int, int], ...] | None:
    """(stage, later stage that waits for it), for rules and pictures of schedules.

    None: a chain, which is what one stage a device is taken for. Stages that share devices are
    pieces of a graph with branches and wait for what they read; without the graph, for nothing.
    """
    devices = [stage.device for stage in plan.stages]
    if len(set(devices)) == len(devices):
        return None
    if graph is None:
        return ()
    return tuple((edge.source, edge.target) for edge in stage_edges(graph, plan.stages))
