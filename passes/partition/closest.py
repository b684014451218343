"""The partition that comes closest to fitting into memory.

It minimises the largest excess of any stage over its device's memory, by dynamic programming over
prefixes of program order.
"""

from __future__ import annotations

import itertools
import math

import numpy as np

from .downsets import DownSets
from .orders import devices_by_index
from .problem import Assignment, StageProblem, topological_order

__all__ = ["closest_partition", "program_order"]


def closest_partition(
    problem: StageProblem, stage_counts: tuple[int, ...]
) -> tuple[Assignment, float]:
    """The partition of program order whose worst stage exceeds its memory least.

    Stages take devices by memory, most first (early stages keep most microbatches in flight).
    Returns it with that excess in bytes, negative if everything fits.
    """
    count = len(problem.units)
    table = program_order(problem)
    if len({entry.memory_bytes for entry in problem.classes}) == 1:
        return _least_excess_alike(table, [number for number in stage_counts if number <= count])
    found = [_least_excess(table, num_stages) for num_stages in stage_counts if num_stages <= count]
    return min(found, key=lambda item: item[1])


def program_order(problem: StageProblem) -> DownSets:
    """The prefixes of program order."""
    order = topological_order(len(problem.units), problem.edges(), lambda unit: unit)
    sets = itertools.accumulate((1 << unit for unit in order), initial=0)
    return DownSets(problem, tuple(sets), complete=False)


def _least_excess(table: DownSets, num_stages: int) -> tuple[Assignment, float]:
    problem = table.problem
    devices = sorted(
        (-entry.memory_bytes, device, cls)
        for cls, entry in enumerate(problem.classes)
        for device in entry.devices
    )
    classes = tuple(cls for _, _, cls in devices[:num_stages])
    value = np.where(np.arange(table.size) == 0, -math.inf, math.inf)
    trail = []
    for stage, cls in enumerate(classes):
        need = table.memory(problem.in_flight(num_stages, stage))
        excess = np.where(table.nested, need - problem.classes[cls].memory_bytes, math.inf)
        reached = np.maximum(value[:, None], excess)
        trail.append(reached.argmin(axis=0))
        value = reached.min(axis=0)
    end, ends = table.size - 1, []
    for origins in reversed(trail):
        ends.append(end)
        end = int(origins[end])
    return table.assign(ends[::-1], classes), float(value[-1])


def _least_excess_alike(table: DownSets, stage_counts: list[int]) -> tuple[Assignment, float]:
    """As `_least_excess` for all numbers of stages in one pass from the last stage to the first,
    on devices of one memory: what is in flight depends on the distance to the last stage only."""
    problem = table.problem
    limit = problem.classes[0].memory_bytes
    value = np.where(np.arange(table.size) == table.size - 1, -math.inf, math.inf)
    trail, totals = [], {}
    for tail in range(1, max(stage_counts) + 1):
        need = table.memory(problem.in_flight(tail, 0))
        reached = np.maximum(np.where(table.nested, need - limit, math.inf), value[None, :])
        trail.append(reached.argmin(axis=1))
        value = reached.min(axis=1)
        totals[tail] = float(value[0])
    best = min(stage_counts, key=lambda number: (totals[number], number))
    place, path = 0, []
    for following in reversed(trail[:best]):
        place = int(following[place])
        path.append(place)
    classes = tuple(cls for _, cls in devices_by_index(problem)[:best])
    return table.assign(path, classes), totals[best]
