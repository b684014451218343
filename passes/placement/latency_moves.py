"""Local search for latency: moves of single groups of operators, kept where latency does not rise.

A rise is also accepted, less and less of it, to leave placements that no single move improves. The
latency is computed by a plain pass over units here, faster than the evaluation that judges what is
found. With one piece a machine, a move is legal if the pieces still do not wait for each other;
with several pieces, the order is that of a list schedule.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence

from .latency_lists import ListScheduler
from .latency_problem import LatencyProblem

__all__ = ["improve_by_moves"]

_MEMORY_TOLERANCE = 1e-9  # as in the evaluation
_RISE = 0.02  # of the value, that is accepted at the start
_MOST_MOVES_PER_GROUP = 300


def improve_by_moves(
    problem: LatencyProblem,
    groups: Sequence[Sequence[int]],
    device_of: Sequence[int],
    *,
    contiguous: bool,
    seconds: float,
    seed: int,
    found: Callable[[Sequence[int]], None],
) -> None:
    """Improve a placement.

    Args:
        problem: with single operators as units.
        groups: operators that are moved together; all are in one.
        device_of: the device of every operator; legal.
        seconds: time to take at most.
        found: given every placement that is better than all before.
    """
    state = _State(problem, groups, device_of)
    value_of = _pieces_value(problem) if contiguous else ListScheduler(problem).value
    generator = random.Random(seed)
    value = best = value_of(state.device_of)
    begin = time.monotonic()
    most = _MOST_MOVES_PER_GROUP * len(groups)
    for number in range(most):
        done = max((time.monotonic() - begin) / max(seconds, 1e-9), number / most)
        if done >= 1:
            return
        move = state.random_move(generator)
        if move is None:
            continue
        before = state.apply(*move)
        new = value_of(state.device_of)
        if new > value + _RISE * (1 - done) ** 2 * generator.random() * best:
            state.apply(move[0], before)
            continue
        value = new
        if value < best * (1 - 1e-9):
            best = value
            found(state.device_of)


class _State:
    """A placement, with the memory in use."""

    def __init__(
        self,
        problem: LatencyProblem,
        groups: Sequence[Sequence[int]],
        device_of: Sequence[int],
    ) -> None:
        self.problem, self.groups = problem, groups
        self.device_of = list(device_of)
        kind_of = problem.workload.kind_of
        self.room = [problem.limit(kind) * (1 + _MEMORY_TOLERANCE) for kind in kind_of]
        self.sizes = [sum(problem.sizes[v] for v in group) for group in groups]
        for group, size in zip(groups, self.sizes, strict=True):
            self.room[device_of[group[0]]] -= size
        present = sorted(set(kind_of))
        self.supported = [
            {k for k in present if all(problem.times[v][k] is not None for v in group)}
            for group in groups
        ]
        group_of = {v: number for number, group in enumerate(groups) for v in group}
        self.near: list[list[int]] = [[] for _ in groups]
        for u, v in problem.edges:
            a, b = group_of[u], group_of[v]
            if a != b:
                self.near[a].append(v)
                self.near[b].append(u)

    def random_move(self, generator: random.Random) -> tuple[int, int] | None:
        """A group and another device that can take it, mostly that of a neighbour."""
        group = generator.randrange(len(self.groups))
        here = self.device_of[self.groups[group][0]]
        if self.near[group] and generator.random() < 0.7:
            device = self.device_of[generator.choice(self.near[group])]
        else:
            device = generator.randrange(len(self.room))
        kind = self.problem.workload.kind_of[device]
        if device == here or kind not in self.supported[group]:
            return None
        return None if self.sizes[group] > self.room[device] else (group, device)

    def apply(self, group: int, device: int) -> int:
        """Move a group; the device where it was."""
        before = self.device_of[self.groups[group][0]]
        self.room[before] += self.sizes[group]
        self.room[device] -= self.sizes[group]
        for v in self.groups[group]:
            self.device_of[v] = device
        return before


def _pieces_value(problem: LatencyProblem) -> Callable[[Sequence[int]], float]:
    """The latency of a placement with one piece a machine; infinite: the pieces wait."""
    kind_of = problem.workload.kind_of
    count, devices = problem.num_units, len(kind_of)
    machines = set(problem.machines)
    times = [[row[k] or 0.0 for k in kind_of] for row in problem.times]
    nets = [(net.producer, net.readers, [net.fees[k] for k in kind_of]) for net in problem.nets]
    edges = problem.edges

    def value_of(device_of: Sequence[int]) -> float:
        # nodes: a machine's piece by its device, a unit on a host by devices + unit
        node = [d if d in machines else devices + v for v, d in enumerate(device_of)]
        busy = [0.0] * (devices + count)
        for v, d in enumerate(device_of):
            busy[node[v]] += times[v][d]
        for u, readers, fees in nets:
            here = device_of[u]
            others = {device_of[r] for r in readers}
            others.discard(here)
            if others:
                if here in machines:
                    busy[here] += fees[here]
                for d in others:
                    if d in machines:
                        busy[d] += fees[d]
        after: dict[int, list[int]] = {}
        waiting = dict.fromkeys(node, 0)
        for u, v in edges:
            a, b = node[u], node[v]
            if a != b:
                after.setdefault(a, []).append(b)
                waiting[b] += 1
        start = dict.fromkeys(waiting, 0.0)
        ready = [one for one, n in waiting.items() if not n]
        last = 0.0
        for one in ready:
            end = start[one] + busy[one]
            last = max(last, end)
            for other in after.get(one, ()):
                if end > start[other]:
                    start[other] = end
                waiting[other] -= 1
                if not waiting[other]:
                    ready.append(other)
        return last if len(ready) == len(waiting) else math.inf

    return value_of
