"""Predicts the memory of devices that run pieces of a graph for a stream of microbatches.

What a device holds: the parameters of all its pieces, once; the boundary values that are under way
between its pieces, from the action that makes them (or, for those that arrive, from one round of
its pieces before they are read, as their receives are posted then) to the last that reads them; and
what `stage_memory` counts of all its operators run as one: transients, messages, inputs, outputs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from ...compiler.ir.graph import Graph
from ...compiler.ir.plan import MemoryPrediction, OptimizerModel, Stage
from ...compiler.ir.schedule import Schedule
from ...compiler.ir.stage_edges import StageEdge
from ...cost_models.memory import consuming_stages, stage_memory
from ...cost_models.memory_tables import MemoryModel, memory_model

__all__ = ["placed_memory"]


def placed_memory(
    graph: Graph,
    stages: Sequence[Stage],
    edges: Sequence[StageEdge],
    schedule: Schedule,
    *,
    backends: Sequence[str],
    fraction: float,
    optimizer: OptimizerModel,
) -> tuple[MemoryPrediction, ...]:
    """Upper bound of the memory of every device that has a piece.

    Args:
        backends: of every device of the cluster.
        fraction: rows of a microbatch relative to those that the graph was captured at.
    """
    table = []
    models: dict[str, MemoryModel] = {}
    for device in sorted({stage.device for stage in stages}):
        backend = backends[device]
        if backend not in models:
            models[backend] = memory_model(graph, batch_fraction=fraction, backend=backend)
        own = [stage for stage in stages if stage.device == device]
        nodes = sorted({node for stage in own for node in stage.nodes})
        whole = [Stage(0, (device,), tuple(nodes))]
        others = [stage for stage in stages if stage.device != device]
        need = stage_memory(
            models[backend],
            nodes,
            in_flight=1,
            optimizer=optimizer,
            device=device,
            num_microbatches=schedule.num_microbatches,
            consumers=consuming_stages(graph, [*whole, *others]),
        )
        held = _held_bytes(models[backend].sizes, device, own, edges, schedule)
        table.append(replace(need, activations_bytes=need.activations_bytes + held))
    return tuple(table)


def _held_bytes(
    sizes: Sequence[float],
    device: int,
    own: Sequence[Stage],
    edges: Sequence[StageEdge],
    schedule: Schedule,
) -> int:
    """Most bytes of boundary values that the device holds between its actions."""
    here = {stage.index for stage in own}
    makers: dict[int, set[int]] = defaultdict(set)  # stage -> values that it makes for later ones
    readers: dict[int, set[int]] = defaultdict(set)
    for edge in edges:
        if edge.target in here:
            readers[edge.target].update(edge.values)
        if edge.source in here:
            makers[edge.source].update(edge.values)
    begin: dict[tuple[int, int], int] = {}  # (value, microbatch) -> position of an action
    end: dict[tuple[int, int], int] = {}
    for position, action in enumerate(schedule.ranks[device]):
        for value in readers[action.stage]:
            key = value, action.microbatch
            begin.setdefault(key, max(0, position - len(here)))
            end[key] = position
        for value in makers[action.stage]:
            key = value, action.microbatch
            begin[key] = end[key] = position
    steps = [0.0] * (len(schedule.ranks[device]) + 1)
    for key, first in begin.items():
        steps[first] += sizes[key[0]]
        steps[end[key] + 1] -= sizes[key[0]]
    level = most = 0.0
    for step in steps:
        level += step
        most = max(most, level)
    return round(most)
