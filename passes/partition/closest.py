"""The partition that comes closest to fitting into memory.

It minimises the largest excess of any stage over its device's memory, by dynamic programming over
prefixes of program order.
"""

from __future__ import annotations

import itertools
import math

import numpy as np

from .downsets import DownSets
from .problem import Assignment, StageProblem, topological_order

__all__ = ["closest_partition", "program_order"]


def closest_partition(
    problem: StageProblem, stage_counts: tuple[int, ...]
) -> tuple[Assignment, float]:
    """The interval partition of program order whose worst stage exceeds its memory least.

    Stages take devices by memory, most first (early stages keep most microbatches in flight).
    Returns it with that excess in bytes, negative if everything fits.
    """
    count = len(problem.units)
    table = program_order(problem)
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
