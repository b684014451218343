"""Optimal partitions of one topological order into consecutive intervals, by dynamic programming.

For an order u_1 .. u_n and S stages, g[s, d, j] is the least additive cost of putting u_1 .. u_j
on s stages that use up the devices d, the last on a known class:

    g[s, d + c, j] = min_{i < j} g[s - 1, d, i] + t(i, j, c) + r(i, j, c) + g(i, j, c)

over intervals whose bottleneck is at most a threshold and whose memory fits; the step time adds
(m - 1) times the bottleneck, so thresholds are raised from the least feasible one until no larger
one can pay off. Every result is a legal partition, hence an upper bound. On a chain (an order
in which each unit feeds the next) every partition is an interval partition, so the least value
over the brackets of thresholds is also a lower bound, up to the optimizer's share, which is
bounded separately.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...compiler.ir.cluster import Link
from .objective import excess_bytes, step_seconds, sync_seconds
from .problem import Assignment, StageProblem

__all__ = ["DeviceOrders", "IntervalResult", "Intervals", "outlook", "search_intervals"]

Table = NDArray[np.float64]
_STEP = 0.002  # relative distance of two bottleneck thresholds
_MAX_THRESHOLDS = 40
_EXACT = 1.0 + 1e-12


@dataclass(frozen=True, slots=True)
class DeviceOrders:
    """The device sequences that a search covers, as a layered graph.

    `arcs[s]` lists (state before stage s, state after, class of stage s, class of stage s - 1).
    """

    arcs: tuple[tuple[tuple[int, int, int, int], ...], ...]

    @staticmethod
    def of_sequence(classes: tuple[int, ...]) -> DeviceOrders:
        """Only the given class for each stage."""
        before = (classes[0], *classes)
        arcs = tuple(((0, 0, cls, before[stage]),) for stage, cls in enumerate(classes))
        return DeviceOrders(arcs)

    @staticmethod
    def all(counts: tuple[int, ...], num_stages: int, max_arcs: int) -> DeviceOrders | None:
        """Every sequence that takes at most `counts[c]` devices of class c, None if too many."""
        layer = {((0,) * len(counts), -1): 0}
        arcs = []
        for _ in range(num_stages):
            following: dict[tuple[tuple[int, ...], int], int] = {}
            step = []
            for (used, last), state in layer.items():
                for cls, count in enumerate(counts):
                    if used[cls] < count:
                        taken = (*used[:cls], used[cls] + 1, *used[cls + 1 :])
                        target = following.setdefault((taken, cls), len(following))
                        step.append((state, target, cls, cls if last < 0 else last))
            arcs.append(tuple(step))
            layer = following
            if sum(map(len, arcs)) > max_arcs:
                return None
        return DeviceOrders(tuple(arcs))


@dataclass(frozen=True, slots=True)
class IntervalResult:
    """Best partition found (None if none fits) and a bound on all interval partitions."""

    assignment: Assignment | None
    seconds: float
    lower_bound: float


class Intervals:
    """Costs of all intervals [i, j) of one topological order of a problem's units."""

    def __init__(self, problem: StageProblem, order: tuple[int, ...]) -> None:
        self.problem = problem
        self.order = order
        self.size = len(order)
        self._position = {unit: index for index, unit in enumerate(order)}
        types = range(1 + max(entry.type for entry in problem.classes))
        units = [problem.units[index] for index in order]
        self.compute = [
            self._sums([u.forward_seconds[t] + u.backward_seconds[t] for u in units]) for t in types
        ]
        self.optimizer = [
            self._sums([u.optimizer_seconds[t] if u.optimizer_seconds else 0.0 for u in units])
            for t in types
        ]
        self.static = self._sums([float(u.static_bytes) for u in units])
        self.saved = self._sums([float(u.saved_bytes) for u in units])
        self.transient = self._accumulate([float(u.transient_bytes) for u in units], np.maximum)
        self.update = self._sums([float(u.update_bytes) for u in units])
        peaks = [float(u.update_peak_bytes) for u in units]
        self.update_peak = self._accumulate(peaks, np.maximum)
        self.sync = np.zeros_like(self.static)
        self._add_shared()
        self._add_flows()
        self.fitting = functools.cache(self._fitting)

    def _sums(self, figures: list[float]) -> Table:
        return self._accumulate(figures, np.add)

    def _accumulate(self, figures: list[float], operation: np.ufunc) -> Table:
        table = np.zeros((self.size + 1, self.size + 1))
        row = np.array(figures)
        for start in range(self.size):
            table[start, start + 1 :] = operation.accumulate(row[start:])
        return table

    def touched(self, users: tuple[int, ...]) -> NDArray[np.bool_]:
        """Whether interval [i, j) contains one of `users`."""
        positions = np.array(sorted(self._position[user] for user in users))
        starts = np.arange(self.size + 1)
        index = np.searchsorted(positions, starts)
        following = np.append(positions, self.size + 1)[index]
        return following[:, None] < starts[None, :]

    def _add_shared(self) -> None:
        for shared in self.problem.shared:
            touched = self.touched(shared.users)
            for table, seconds in zip(self.compute, shared.forward_seconds, strict=False):
                table += np.where(touched, seconds, 0.0)
            for table, seconds in zip(self.optimizer, shared.optimizer_seconds, strict=False):
                table += touched * seconds
            self.static += touched * float(shared.static_bytes)
            self.saved += touched * float(shared.saved_bytes)
            self.transient = np.maximum(self.transient, touched * float(shared.transient_bytes))
            self.update += touched * float(shared.update_bytes)
            peak = touched * float(shared.update_peak_bytes)
            self.update_peak = np.maximum(self.update_peak, peak)
            if shared.reduced_bytes and len(shared.users) > 1:
                places = sorted(self._position[user] for user in shared.users)
                self.sync[places[0] + 1 : places[-1] + 1, places[-1] + 1 :] += sync_seconds(
                    self.problem, shared, 2
                )

    def _add_flows(self) -> None:
        shape = (self.size + 1, self.size + 1)
        self._messages = np.zeros(shape), np.zeros(shape)
        self._bytes = np.zeros(shape), np.zeros(shape)
        self._sent = np.zeros(shape), np.zeros(shape)
        for flow in self.problem.flows:
            users = tuple(user for user in flow.consumers if user != flow.producer)
            if not users:
                continue
            crossing = self.touched(users)
            place, last = self._position[flow.producer], max(self._position[u] for u in users)
            crossing[: place + 1] = False
            for way, num_bytes in enumerate((flow.forward_bytes, flow.gradient_bytes)):
                if num_bytes:
                    self._messages[way][crossing] += 1
                    self._bytes[way][crossing] += num_bytes
                    self._sent[way][: place + 1, place + 1 : last + 1] += num_bytes

    def transfers(self, way: int, link: Link) -> Table:
        """Seconds of receiving values (way 0) or returning gradients (way 1) over `link`."""
        return (
            self._messages[way] * link.latency_seconds + self._bytes[way] / link.bytes_per_second
        )

    def _fitting(self, in_flight: int, limit_bytes: int) -> NDArray[np.bool_]:
        """Whether interval [i, j), not empty, fits into so much memory."""
        table: NDArray[np.bool_] = np.triu(self.memory(in_flight) <= limit_bytes, 1)
        return table

    def memory(self, in_flight: int) -> Table:
        """Bytes that interval [i, j) needs on its device."""
        incoming = (in_flight + 1) * self._bytes[0] + self._bytes[1]
        outgoing = max(in_flight - 1, 1) * self._sent[0] + self._sent[1]
        at_work = in_flight * self.saved + self.transient
        update = np.maximum(self.update, self.update_peak)
        table: Table = self.static + np.maximum(at_work, update) + incoming + outgoing
        return table

    def flows_are_local(self) -> bool:
        """Whether each value is read by the next unit only, so that it crosses one boundary."""
        return all(
            self._position[user] - self._position[flow.producer] <= 1
            for flow in self.problem.flows
            for user in flow.consumers
        )

    def is_chain(self) -> bool:
        """Whether each unit feeds the next one, so that no other order exists."""
        edges = set(self.problem.edges())
        return all(pair in edges for pair in zip(self.order, self.order[1:], strict=False))


class _Search:
    """The tables of one search: intervals, a number of stages, device orders."""

    def __init__(self, intervals: Intervals, num_stages: int, orders: DeviceOrders) -> None:
        self.intervals = intervals
        self.problem = intervals.problem
        self.num_stages = num_stages
        self.orders = orders
        self.additive = functools.cache(self._additive)
        self.bottleneck = functools.cache(self._bottleneck)
        self._fits = functools.cache(self._memory_fits)
        self._under = functools.lru_cache(maxsize=16)(self._is_under)
        self.stage_matters = bool(self.problem.stage_pins)

    def _additive(self, cls: int, before: int) -> Table:
        link = self.problem.links[before][cls]
        table = self.intervals.compute[self.problem.classes[cls].type] + self.intervals.sync
        return table + self.intervals.transfers(0, link) + self.intervals.transfers(1, link)

    def _bottleneck(self, cls: int, before: int) -> Table:
        link = self.problem.links[before][cls]
        table = self.intervals.compute[self.problem.classes[cls].type]
        for way in (0, 1):
            table = np.maximum(table, self.intervals.transfers(way, link))
        return table

    def _memory_fits(self, cls: int, in_flight: int, stage: int) -> NDArray[np.bool_]:
        table = self.intervals.fitting(in_flight, self.problem.classes[cls].memory_bytes)
        for unit, pinned in self.problem.class_pins:
            if pinned != cls:
                table = table & ~self.intervals.touched((unit,))
        for unit, wanted in self.problem.stage_pins:
            touched = self.intervals.touched((unit,))
            table = table & (touched if wanted == stage else ~touched)
        return table

    def _is_under(self, cls: int, before: int, threshold: float) -> NDArray[np.bool_]:
        table: NDArray[np.bool_] = self.bottleneck(cls, before) <= threshold
        return table

    def fits(self, cls: int, stage: int) -> NDArray[np.bool_]:
        """Which intervals stage `stage` may be on a device of class `cls`."""
        in_flight = self.problem.in_flight(self.num_stages, stage)
        return self._fits(cls, in_flight, stage if self.stage_matters else -1)

    def run(self, cost: Callable[[int, int], Table], join: np.ufunc, threshold: float) -> _Path:
        """Least `join` of stage costs over all interval partitions under `threshold`."""
        start = np.full(self.intervals.size + 1, math.inf)
        start[0] = 0.0
        values = {0: start}
        trail = []
        for stage, arcs in enumerate(self.orders.arcs):
            following: dict[int, Table] = {}
            origin: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}
            for number, (source, target, cls, before) in enumerate(arcs):
                allowed = self.fits(cls, stage)
                if threshold < math.inf:
                    allowed = allowed & self._under(cls, before, threshold)
                table = np.where(allowed, cost(cls, before), math.inf)
                reached = join(values[source][:, None], table)
                first = reached.argmin(axis=0)
                best = np.take_along_axis(reached, first[None, :], axis=0)[0]
                if target not in following:
                    following[target] = best
                    origin[target] = first, np.full(len(first), number)
                else:
                    better = best < following[target]
                    following[target] = np.where(better, best, following[target])
                    starts, numbers = origin[target]
                    origin[target] = np.where(better, first, starts), np.where(
                        better, number, numbers
                    )
            values = following
            trail.append(origin)
        return _Path(self, {state: float(table[-1]) for state, table in values.items()}, trail)


@dataclass(frozen=True, slots=True)
class _Path:
    search: _Search
    totals: dict[int, float]
    trail: list[dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]]]

    @property
    def value(self) -> float:
        return min(self.totals.values())

    def assignment(self) -> Assignment:
        """The partition with the least value, which must be finite."""
        state = min(self.totals, key=lambda key: (self.totals[key], key))
        end = self.search.intervals.size
        stages = [0] * end
        classes = []
        for stage in reversed(range(self.search.num_stages)):
            starts, numbers = self.trail[stage][state]
            start, number = int(starts[end]), int(numbers[end])
            for position in range(start, end):
                stages[self.search.intervals.order[position]] = stage
            state, _, cls, _ = self.search.orders.arcs[stage][number]
            classes.append(cls)
            end = start
        return Assignment(tuple(stages), tuple(reversed(classes)))


def outlook(intervals: Intervals, max_stages: int) -> tuple[float, ...]:
    """Lower bounds of the step time of this order's interval partitions into 1, 2, .. stages.

    For a problem with one class of devices: the least bottleneck and the least additive cost,
    each by itself, from the last stage to the first, so that one pass serves all numbers of
    stages (in-flight microbatches depend on the distance to the last stage only). Infinite where
    nothing fits in memory. Pins of stages and what the optimizer costs are left out.
    """
    problem = intervals.problem
    (device,) = problem.classes
    (link,) = problem.links[0]
    transfers = intervals.transfers(0, link), intervals.transfers(1, link)
    compute = intervals.compute[device.type]
    bottleneck = np.maximum(compute, np.maximum(*transfers))
    additive = compute + transfers[0] + transfers[1] + intervals.sync
    low = free = np.where(np.arange(intervals.size + 1) == intervals.size, 0.0, math.inf)
    bounds = []
    for tail in range(1, max_stages + 1):
        fits = intervals.fitting(problem.in_flight(tail, 0), device.memory_bytes)
        low = np.where(fits, np.maximum(bottleneck, low[None, :]), math.inf).min(axis=1)
        free = np.where(fits, additive + free[None, :], math.inf).min(axis=1)
        bounds.append(float(free[0]) + (problem.num_microbatches - 1) * float(low[0]))
    return tuple(bounds)


def search_intervals(
    intervals: Intervals, num_stages: int, orders: DeviceOrders, cutoff: float
) -> IntervalResult:
    """Best interval partition into exactly `num_stages` stages that beats `cutoff` seconds.

    The lower bound covers all interval partitions of this order over `orders`, with what their
    optimizer and reductions cost left out; it is infinite if none fits in memory.
    """
    problem = intervals.problem
    search = _Search(intervals, num_stages, orders)
    least = search.run(search.bottleneck, np.maximum, math.inf).value
    if math.isinf(least):
        return IntervalResult(None, math.inf, math.inf)
    free = search.run(search.additive, np.add, math.inf)
    best: Assignment | None = None
    seconds, bound = math.inf, math.inf
    repeats = problem.num_microbatches - 1
    for low, high in _brackets(least) if repeats else ((0.0, math.inf),):
        path = search.run(search.additive, np.add, high * _EXACT)
        found = path.assignment()
        total = step_seconds(problem, found)
        if total < seconds and excess_bytes(problem, found) <= 0:
            best, seconds = found, total
        bound = min(bound, path.value + repeats * low)
        rest = free.value + repeats * high if repeats else math.inf
        if rest >= min(seconds, cutoff) or path.value <= free.value * _EXACT:
            return IntervalResult(best, seconds, min(bound, rest))
    return IntervalResult(best, seconds, bound)


def _brackets(least: float) -> Iterator[tuple[float, float]]:
    """Consecutive brackets of bottlenecks, the first one the single value `least`."""
    yield least, least
    low, step = least, _STEP
    for number in range(_MAX_THRESHOLDS):
        if number % 10 == 9:
            step *= 2
        yield low, low * (1 + step)
        low *= 1 + step
    yield low, math.inf
