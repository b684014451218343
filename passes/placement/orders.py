"""Topological orders of units whose intervals make good contiguous pieces.

The best pieces of a given order are found exactly (`intervals`), so that what counts is that some
order keeps units together that should share a device: orders that finish one branch before the
next, that go level by level, and that keep what is open between before and after small.
Units that no arc reaches (free backward operators) go where their neighbours are.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterator

from .problem import PlacementProblem

__all__ = ["topological_orders"]


def topological_orders(
    problem: PlacementProblem, *, count: int, seed: int = 0
) -> Iterator[list[int]]:
    """Up to `count` distinct orders of all units, the most promising first."""
    graph = _Arcs(problem)
    seen: set[tuple[int, ...]] = set()
    for number, order in enumerate(_candidates(graph, problem, seed)):
        if number == count:
            return
        placed = _with_free_units(problem, graph.bound, order)
        if (key := tuple(placed)) not in seen:
            seen.add(key)
            yield placed


class _Arcs:
    """Arcs both ways, and which units have any."""

    def __init__(self, problem: PlacementProblem) -> None:
        size = problem.num_units
        self.after: list[list[int]] = [[] for _ in range(size)]
        self.before: list[list[int]] = [[] for _ in range(size)]
        for u, v in problem.arcs:
            self.after[u].append(v)
            self.before[v].append(u)
        self.bound = [bool(a or b) for a, b in zip(self.after, self.before, strict=True)]

    def sorted_by(self, rank: list[float]) -> list[int]:
        """The topological order that takes the ready unit of least rank first."""
        waiting = [len(one) for one in self.before]
        ready = [(rank[v], v) for v, n in enumerate(waiting) if not n and self.bound[v]]
        heapq.heapify(ready)
        order = []
        while ready:
            _, unit = heapq.heappop(ready)
            order.append(unit)
            for other in self.after[unit]:
                waiting[other] -= 1
                if not waiting[other]:
                    heapq.heappush(ready, (rank[other], other))
        return order

    def depth_first(self, rank: list[float], *, backwards: bool) -> list[int]:
        """A topological order that follows one branch to its end before it takes the next."""
        ahead, behind = (self.before, self.after) if backwards else (self.after, self.before)
        waiting = [len(one) for one in behind]
        stack = sorted(
            (v for v, n in enumerate(waiting) if not n and self.bound[v]),
            key=lambda v: (rank[v], v),
            reverse=True,
        )
        order = []
        while stack:
            unit = stack.pop()
            order.append(unit)
            ready = []
            for other in ahead[unit]:
                waiting[other] -= 1
                if not waiting[other]:
                    ready.append(other)
            stack.extend(sorted(ready, key=lambda v: (rank[v], v), reverse=True))
        return order[::-1] if backwards else order


def _candidates(graph: _Arcs, problem: PlacementProblem, seed: int) -> Iterator[list[int]]:
    size = problem.num_units
    position = [float(v) for v in range(size)]
    program = graph.sorted_by(position)
    yield program
    yield _least_open(graph, problem, position)
    early, late = _levels(graph, program)
    yield graph.depth_first(position, backwards=True)
    yield graph.depth_first(position, backwards=False)
    yield graph.sorted_by(late)
    yield graph.sorted_by(early)
    generator = random.Random(seed)
    while True:
        rank = [generator.random() for _ in range(size)]
        yield graph.depth_first(rank, backwards=True)
        yield _least_open(graph, problem, rank)
        yield graph.depth_first(rank, backwards=False)


def _levels(graph: _Arcs, program: list[int]) -> tuple[list[float], list[float]]:
    """Longest path from a source to each unit, and minus that from each unit to a sink."""
    early, late = [0.0] * len(graph.bound), [0.0] * len(graph.bound)
    for unit in program:
        for other in graph.after[unit]:
            early[other] = max(early[other], early[unit] + 1)
    for unit in reversed(program):
        for other in graph.after[unit]:
            late[unit] = min(late[unit], late[other] - 1)
    return early, late


def _least_open(graph: _Arcs, problem: PlacementProblem, rank: list[float]) -> list[int]:
    """Takes next the ready unit after which nets that are begun and not ended cost least.

    What a unit adds is looked up again only when it comes to the top of the heap.
    """
    fee = problem.fees.max(axis=1).tolist() if len(problem.pins) else []
    left = [len(pins) for pins in problem.pins]
    full = list(left)

    def growth(unit: int) -> float:
        opened = closed = 0.0
        for net in problem.nets_of[unit]:
            if left[net] == full[net]:
                opened += fee[net]
            elif left[net] == 1:
                closed += fee[net]
        return opened - closed

    waiting = [len(one) for one in graph.before]
    can_go = [bound and not n for bound, n in zip(graph.bound, waiting, strict=True)]
    ready = [(growth(v), rank[v], v) for v, can in enumerate(can_go) if can]
    heapq.heapify(ready)
    order = []
    while ready:
        was, _, unit = heapq.heappop(ready)
        if not can_go[unit]:
            continue
        if (now := growth(unit)) > was:
            heapq.heappush(ready, (now, rank[unit], unit))
            continue
        order.append(unit)
        can_go[unit] = False
        changed: set[int] = set()
        for net in problem.nets_of[unit]:
            left[net] -= 1
            if left[net] in (1, full[net] - 1):
                changed.update(problem.pins[net])
        for other in graph.after[unit]:
            waiting[other] -= 1
            if not waiting[other]:
                can_go[other] = True
                changed.add(other)
        for other in changed:
            if can_go[other]:
                heapq.heappush(ready, (growth(other), rank[other], other))
    return order


def _with_free_units(problem: PlacementProblem, bound: list[bool], order: list[int]) -> list[int]:
    """Units without arcs, put behind a neighbour by net that has a place; else at the end."""
    if len(order) == problem.num_units:
        return order
    position = {unit: float(index) for index, unit in enumerate(order)}
    pending = [unit for unit in range(problem.num_units) if not bound[unit]]
    while pending:
        found = {}
        for unit in pending:
            near = [
                position[other]
                for net in problem.nets_of[unit]
                for other in problem.pins[net]
                if other in position
            ]
            if near:
                found[unit] = sorted(near)[len(near) // 2]
        if not found:
            found = {unit: float(len(order)) for unit in pending}
        position.update(found)
        pending = [unit for unit in pending if unit not in position]
    return sorted(
        range(problem.num_units), key=lambda unit: (position[unit], not bound[unit], unit)
    )
