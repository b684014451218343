"""List scheduling for latency: the order in which machines run their operators, and where they run.

After Topcuoglu et al., "Performance-Effective and Low-Complexity Task Scheduling for Heterogeneous
Computing" (HEFT, 2002), with memory, shared devices, and transfers that machines spend time on.
The schedules are judged by `piece_latency` afterwards: what a list assumes of transfers that later
operators cause is an estimate.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

from .latency_problem import LatencyProblem, machine_order

__all__ = ["ListScheduler", "earliest_finish", "single_pieces", "whole_pieces"]

_MEMORY_TOLERANCE = 1e-9  # as in the evaluation


def single_pieces(
    problem: LatencyProblem, device_of: Sequence[int], order: Sequence[int]
) -> list[tuple[int, ...]]:
    """Every unit on a machine as a piece of its own, in an order of units."""
    machines = set(problem.machines)
    return [(v,) for u in order if device_of[u] in machines for v in problem.members[u]]


def whole_pieces(problem: LatencyProblem, device_of: Sequence[int]) -> list[tuple[int, ...]] | None:
    """One piece a machine, in an order in which they can run; None: they wait for each other."""
    order = machine_order(problem, device_of)
    if order is None:
        return None
    held: dict[int, list[int]] = {d: [] for d in order}
    for v, d in enumerate(device_of):
        if d in held:
            held[d].extend(problem.members[v])
    return [tuple(held[d]) for d in order if held[d]]


class ListScheduler:
    """Orders in which a machine that is free takes, of its units whose inputs are ready, the one
    with the longest path behind it."""

    def __init__(self, problem: LatencyProblem) -> None:
        self.lists = _Lists(problem)
        self.kind_of = problem.workload.kind_of

    def order(self, device_of: Sequence[int]) -> list[int]:
        """Units in the order of their starts."""
        return self._run(device_of)[0]

    def value(self, device_of: Sequence[int]) -> float:
        """The latency of the schedule, up to which reader of a machine moves a result in."""
        return self._run(device_of)[1]

    def _run(self, device_of: Sequence[int]) -> tuple[list[int], float]:
        span = self._spans(device_of)
        return _run(self.lists, device_of, span, self.lists.behind(span))

    def _spans(self, device_of: Sequence[int]) -> list[float]:
        """Time of every unit with what it moves; of a machine's readers, the first in topological
        order moves a result in."""
        lists, kind_of = self.lists, self.kind_of
        times = lists.problem.times
        span = [times[v][kind_of[d]] or 0.0 for v, d in enumerate(device_of)]
        for net in lists.problem.nets:
            here = device_of[net.producer]
            others = {device_of[reader] for reader in net.readers}
            others.discard(here)
            if not others:
                continue
            if here in lists.machines:
                span[net.producer] += net.fees[kind_of[here]]
            for reader in lists.by_rank(net.readers):
                device = device_of[reader]
                if device in others:
                    others.discard(device)
                    if device in lists.machines:
                        span[reader] += net.fees[kind_of[device]]
        return span


class _Lists:
    """Neighbours of every unit, and a topological order."""

    def __init__(self, problem: LatencyProblem) -> None:
        self.problem = problem
        self.machines = set(problem.machines)
        self.before: list[list[int]] = [[] for _ in range(problem.num_units)]
        self.after: list[list[int]] = [[] for _ in range(problem.num_units)]
        for u, v in problem.edges:
            self.after[u].append(v)
            self.before[v].append(u)
        waiting = [len(one) for one in self.before]
        self.order = [v for v, n in enumerate(waiting) if not n]
        for v in self.order:
            for other in self.after[v]:
                waiting[other] -= 1
                if not waiting[other]:
                    self.order.append(other)
        self.rank = [0] * problem.num_units
        for number, v in enumerate(self.order):
            self.rank[v] = number

    def by_rank(self, units: Sequence[int]) -> Sequence[int]:
        return sorted(units, key=self.rank.__getitem__) if len(units) > 1 else units

    def behind(self, span: Sequence[float]) -> list[float]:
        """Longest path from the start of every unit to the end."""
        longest = [0.0] * len(span)
        for v in reversed(self.order):
            longest[v] = span[v] + max((longest[c] for c in self.after[v]), default=0.0)
        return longest


def _run(
    lists: _Lists, device_of: Sequence[int], span: Sequence[float], urgency: Sequence[float]
) -> tuple[list[int], float]:
    """Units in the order of their starts, and when the last one ends."""
    waiting = [len(one) for one in lists.before]
    ready: dict[int, list[tuple[float, int, int]]] = {d: [] for d in lists.machines}
    free = dict.fromkeys(lists.machines, True)
    ended: list[tuple[float, int, int]] = []  # time, rank, unit
    order: list[int] = []

    def begin(v: int, now: float) -> None:
        order.append(v)
        heapq.heappush(ended, (now + span[v], lists.rank[v], v))

    def arrive(v: int, now: float) -> None:
        if device_of[v] in lists.machines:
            heapq.heappush(ready[device_of[v]], (-urgency[v], lists.rank[v], v))
        else:
            begin(v, now)

    for v in lists.order:
        if not waiting[v]:
            arrive(v, 0.0)
    touched = set(lists.machines)
    now = 0.0
    while True:
        for d in sorted(touched):
            if free[d] and ready[d]:
                free[d] = False
                begin(heapq.heappop(ready[d])[2], now)
        touched.clear()
        if not ended:
            return order, now
        now = ended[0][0]
        while ended and ended[0][0] == now:
            _, _, v = heapq.heappop(ended)
            if device_of[v] in lists.machines:
                free[device_of[v]] = True
                touched.add(device_of[v])
            for other in lists.after[v]:
                waiting[other] -= 1
                if not waiting[other]:
                    arrive(other, now)
                    touched.add(device_of[other])
            touched &= lists.machines


def earliest_finish(problem: LatencyProblem) -> list[int] | None:
    """Units, those with the longest path behind them first, each on the device where it finishes
    first; None: some unit finds no memory."""
    lists = _Lists(problem)
    kind_of = problem.workload.kind_of
    kinds = sorted(set(kind_of))
    mean = [_mean([t for k in kinds if (t := row[k]) is not None]) for row in problem.times]
    moving = [0.0] * problem.num_units
    for net in problem.nets:
        moving[net.producer] += max(net.fees[k] for k in kinds)
    urgency = lists.behind([t + m for t, m in zip(mean, moving, strict=True)])
    return _Earliest(lists, urgency).run()


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.inf


class _Earliest:
    """State of `earliest_finish`: when devices are free and results ready, memory used."""

    def __init__(self, lists: _Lists, urgency: Sequence[float]) -> None:
        self.lists, self.problem, self.urgency = lists, lists.problem, urgency
        self.kind_of = self.problem.workload.kind_of
        self.devices = (*self.problem.hosts, *self.problem.machines)
        self.free = dict.fromkeys(self.devices, 0.0)
        self.room = {
            d: self.problem.limit(self.kind_of[d]) * (1 + _MEMORY_TOLERANCE) for d in self.devices
        }
        self.device_of: list[int | None] = [None] * self.problem.num_units
        self.finish = [0.0] * self.problem.num_units
        self.group_of: dict[int, tuple[int, ...]] = {
            v: group for group in self.problem.tied for v in group
        }
        self.entering: list[list[int]] = [[] for _ in range(self.problem.num_units)]
        for number, net in enumerate(self.problem.nets):
            for reader in net.readers:
                self.entering[reader].append(number)
        self.moved: set[tuple[int, int]] = set()  # (net, device) that has been paid for

    def run(self) -> list[int] | None:
        order = sorted(
            range(self.problem.num_units), key=lambda v: (-self.urgency[v], self.lists.rank[v])
        )
        for v in order:
            options = [self._finish(v, d) for d in self._choices(v)]
            if not options:
                return None
            end, d = min(options)
            self._put(v, d, end)
        return [d for d in self.device_of if d is not None]

    def _choices(self, v: int) -> list[int]:
        fixed = self.device_of[v]
        if fixed is not None:
            return [fixed]
        group = self.group_of.get(v, (v,))
        held = sum(self.problem.sizes[one] for one in group)
        fresh: set[int] = set()  # kinds with an untouched device: one stands for all
        found = []
        for d in self.devices:
            kind = self.kind_of[d]
            if held > self.room[d] or any(self.problem.times[u][kind] is None for u in group):
                continue
            if self.free[d] == 0.0 and d in self.lists.machines:
                if kind in fresh:
                    continue
                fresh.add(kind)
            found.append(d)
        return found

    def _finish(self, v: int, d: int) -> tuple[float, int]:
        start, fees = 0.0, 0.0
        for number in self.entering[v]:
            net = self.problem.nets[number]
            source = self.device_of[net.producer]
            ready = self.finish[net.producer]
            if source is not None and source != d:
                if source in self.lists.machines:
                    ready += net.fees[self.kind_of[source]]
                if d in self.lists.machines and (number, d) not in self.moved:
                    fees += net.fees[self.kind_of[d]]
            start = max(start, ready)
        if d in self.lists.machines:
            start = max(start, self.free[d])
        return start + fees + (self.problem.times[v][self.kind_of[d]] or 0.0), d

    def _put(self, v: int, d: int, end: float) -> None:
        if self.device_of[v] is None:
            for one in self.group_of.get(v, (v,)):
                self.device_of[one] = d
                self.room[d] -= self.problem.sizes[one]
        self.finish[v] = end
        self.moved.update((number, d) for number in self.entering[v])
        if d in self.lists.machines:
            self.free[d] = max(self.free[d], end)
