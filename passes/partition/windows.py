"""The stages that a unit can be in, given how long a stage may take.

Stages 0 .. s together hold at most (s + 1) times the largest bottleneck of work, and so much static
memory; the ancestors of a unit come before it, its descendants after it.
"""

from __future__ import annotations

import math

from .problem import StageProblem, topological_order

__all__ = ["unit_windows"]


def unit_windows(
    problem: StageProblem, num_stages: int, bottleneck_seconds: float
) -> tuple[tuple[int, int], ...] | None:
    """First and last stage of every unit if no stage takes longer than the bottleneck.

    None when some unit has no stage left, which proves that no partition is that fast.
    """
    count = len(problem.units)
    before, after = _closures(problem)
    work = [
        min(f + b for f, b in zip(unit.forward_seconds, unit.backward_seconds, strict=True))
        for unit in problem.units
    ]
    memory = max(entry.memory_bytes for entry in problem.classes)
    windows = []
    pins = dict(problem.stage_pins)
    for unit in range(count):
        lead = _stages_needed(problem, work, before[unit], bottleneck_seconds, memory)
        tail = _stages_needed(problem, work, after[unit], bottleneck_seconds, memory)
        first, last = lead - 1, num_stages - tail
        if unit in pins:
            first, last = max(first, pins[unit]), min(last, pins[unit])
        windows.append((max(first, 0), last))
    for source, target in sorted(problem.edges(), key=lambda edge: bin(before[edge[1]]).count("1")):
        windows[target] = max(windows[target][0], windows[source][0]), windows[target][1]
    for source, target in sorted(problem.edges(), key=lambda edge: bin(after[edge[0]]).count("1")):
        windows[source] = windows[source][0], min(windows[source][1], windows[target][1])
    return tuple(windows) if all(first <= last for first, last in windows) else None


def _stages_needed(
    problem: StageProblem, work: list[float], members: int, bottleneck: float, memory: int
) -> int:
    """Least number of stages that hold the units of the bit set `members`."""
    units = [unit for unit in range(len(work)) if members >> unit & 1]
    seconds = sum(work[unit] for unit in units)
    static = sum(problem.units[unit].static_bytes for unit in units)
    if bottleneck <= 0:
        return len(work) + 1
    by_time = math.ceil(seconds / bottleneck * (1 - 1e-9))
    return max(1, by_time, -(-static // memory) if memory > 0 else 1)


def _closures(problem: StageProblem) -> tuple[list[int], list[int]]:
    """Bit sets of each unit with its ancestors, and with its descendants."""
    edges = problem.edges()
    order = topological_order(len(problem.units), edges, lambda unit: unit)
    before = [1 << unit for unit in range(len(problem.units))]
    after = list(before)
    position = {unit: index for index, unit in enumerate(order)}
    for source, target in sorted(edges, key=lambda edge: position[edge[0]]):
        before[target] |= before[source]
    for source, target in sorted(edges, key=lambda edge: -position[edge[1]]):
        after[source] |= after[target]
    return before, after
