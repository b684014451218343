"""Optimal partitions by dynamic programming over down-sets of the DAG of units.

A down-set holds with each unit all that it is computed from. Stages 0 .. s of any partition are a
down-set, so a partition into S stages is a chain of S + 1 nested down-sets, and each stage the
difference of two (Tarnawski et al., Efficient Algorithms for Device Placement of DNN Graph
Operators, 2020). With D the down-sets and d the devices used so far, the last on a known class,

    g[s, d + c, J] = min_{I < J in D} g[s - 1, d, I] + t(I, J, c) + r(I, J, c) + g(I, J, c)

over differences whose bottleneck is at most a threshold and whose memory fits; the step time adds
(m - 1) times the bottleneck, so thresholds are raised from the least feasible one until no larger
one can pay off. Every result is a legal partition, hence an upper bound. Chains have n + 1
down-sets and transformers few more; if D holds all of them, the least value over the brackets of
thresholds is also a lower bound, up to the optimizer's share, which is bounded separately. Of
graphs with too many, D holds the prefixes of several topological orders.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...compiler.ir.cluster import Link
from .objective import excess_bytes, held_seconds, step_seconds, sync_seconds
from .problem import Assignment, StageProblem

__all__ = ["ChainResult", "DeviceOrders", "DownSets", "all_down_sets", "outlook", "search_chains"]

Table = NDArray[np.float64]
_STEP = 0.002  # relative distance of two bottleneck thresholds
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
class ChainResult:
    """Best partition found (None if none fits) and a bound on all partitions of its down-sets."""

    assignment: Assignment | None
    seconds: float
    lower_bound: float


def all_down_sets(
    num_units: int, edges: Sequence[tuple[int, int]], most: int
) -> tuple[int, ...] | None:
    """All down-sets of a DAG as bit sets, by size; None if there are more than `most`."""
    needs = [0] * num_units
    for source, target in edges:
        needs[target] |= 1 << source
    found, layer = [0], [0]
    while layer:
        following: dict[int, None] = {}
        for members in layer:
            for unit in range(num_units):
                if not members >> unit & 1 and needs[unit] & ~members == 0:
                    following[members | 1 << unit] = None
        layer = list(following)
        found += layer
        if len(found) > most:
            return None
    return tuple(found)


class DownSets:
    """Costs of the differences J - I of the given down-sets, as tables over I (rows) and J.

    Args:
        sets: bit sets, the empty one first and the full one last.
        complete: whether these are all down-sets of the problem's DAG.
    """

    def __init__(self, problem: StageProblem, sets: Sequence[int], complete: bool) -> None:
        self.problem = problem
        self.sets = tuple(sets)
        self.complete = complete
        self.size = len(self.sets)
        count = len(problem.units)
        self._inside = np.array([[bits >> unit & 1 for unit in range(count)] for bits in self.sets])
        self._inside = self._inside.astype(bool)
        sizes = self._inside.sum(axis=1)
        together = self._inside.astype(np.float32) @ self._inside.T.astype(np.float32)
        self.nested = (together == sizes[:, None]) & (sizes[:, None] < sizes[None, :])
        types = range(1 + max(entry.type for entry in problem.classes))
        units = problem.units
        self.compute = [
            self._sums([u.forward_seconds[t] + u.backward_seconds[t] for u in units]) for t in types
        ]
        self.static = self._sums([float(u.static_bytes) for u in units])
        self.saved = self._sums([float(u.saved_bytes) for u in units])
        self.transient = self._peaks([float(u.transient_bytes) for u in units])
        self.update = self._sums([float(u.update_bytes) for u in units])
        self.update_peak = self._peaks([float(u.update_peak_bytes) for u in units])
        self.sync = np.zeros((self.size, self.size))
        self._add_shared()
        self._add_flows()
        self.fitting = functools.cache(self._fitting)

    def under(self, problem: StageProblem) -> DownSets:
        """The same tables for `problem`, which may differ in the memory of its devices only."""
        other = copy.copy(self)
        other.problem = problem
        return other

    def _sums(self, figures: list[float]) -> Table:
        row = np.array(figures)
        finite = np.where(np.isfinite(row), row, 0.0)
        totals = self._inside @ finite
        table: Table = totals[None, :] - totals[:, None]
        for unit in np.flatnonzero(~np.isfinite(row)):
            table[self.between(int(unit))] = math.inf
        return table

    def _peaks(self, figures: list[float]) -> Table:
        table = np.zeros((self.size, self.size))
        for unit in sorted(range(len(figures)), key=lambda unit: figures[unit]):
            if figures[unit]:
                table[self.between(unit)] = figures[unit]
        return table

    def between(self, unit: int) -> NDArray[np.bool_]:
        """Where `unit` is in J - I."""
        inside = self._inside[:, unit]
        table: NDArray[np.bool_] = ~inside[:, None] & inside[None, :]
        return table

    def touched(self, users: tuple[int, ...]) -> NDArray[np.bool_]:
        """Where J - I has one of `users`."""
        table = self.between(users[0])
        for user in users[1:]:
            table |= self.between(user)
        return table

    def _add_shared(self) -> None:
        for shared in self.problem.shared:
            touched = self.touched(shared.users)
            for table, seconds in zip(self.compute, shared.forward_seconds, strict=False):
                table += np.where(touched, seconds, 0.0)
            self.static += touched * float(shared.static_bytes)
            self.saved += touched * float(shared.saved_bytes)
            self.transient = np.maximum(self.transient, touched * float(shared.transient_bytes))
            self.update += touched * float(shared.update_bytes)
            peak = touched * float(shared.update_peak_bytes)
            self.update_peak = np.maximum(self.update_peak, peak)
            if shared.reduced_bytes and len(shared.users) > 1:
                users = self._inside[:, list(shared.users)]
                begun, done = np.any(users, axis=1), np.all(users, axis=1)
                last = np.outer(begun & ~done, done)
                self.sync += last * sync_seconds(self.problem, shared, 2)

    def _add_flows(self) -> None:
        shape = (self.size, self.size)
        self._messages = np.zeros(shape), np.zeros(shape)
        self._bytes = np.zeros(shape), np.zeros(shape)
        self._sent = np.zeros(shape), np.zeros(shape)
        self.held = np.zeros(shape)
        for flow in self.problem.flows:
            users = tuple(user for user in flow.consumers if user != flow.producer)
            if not users:
                continue
            made = self._inside[:, flow.producer]
            crossing = self.touched(users) & made[:, None]
            wanted = ~self._inside[:, list(users)].all(axis=1)
            leaving = ~made[:, None] & (made & wanted)[None, :]
            if seconds := held_seconds(self.problem, flow):
                self.held[crossing | leaving] += seconds
            for way, num_bytes in enumerate((flow.forward_bytes, flow.gradient_bytes)):
                if num_bytes:
                    self._messages[way][crossing] += 1
                    self._bytes[way][crossing] += num_bytes
                    self._sent[way][leaving] += num_bytes

    def transfers(self, way: int, link: Link) -> Table:
        """Seconds of receiving values (way 0) or returning gradients (way 1) over `link`."""
        return self._messages[way] * link.latency_seconds + self._bytes[way] / link.bytes_per_second

    def _fitting(self, in_flight: int, limit_bytes: int) -> NDArray[np.bool_]:
        """Where I lies in J and J - I fits into so much memory."""
        table: NDArray[np.bool_] = self.nested & (self.memory(in_flight) <= limit_bytes)
        return table

    def memory(self, in_flight: int) -> Table:
        """Bytes that J - I needs on its device."""
        incoming = (in_flight + 1) * self._bytes[0] + self._bytes[1]
        outgoing = max(in_flight - 1, 1) * self._sent[0] + self._sent[1]
        at_work = in_flight * self.saved + self.transient
        update = np.maximum(self.update, self.update_peak)
        table: Table = self.static + np.maximum(at_work, update) + incoming + outgoing
        return table

    def flows_are_local(self) -> bool:
        """Whether no value can cross more than one boundary: all are read by the next unit only."""
        return self.size == len(self.problem.units) + 1 and all(
            self._place(user) - self._place(flow.producer) <= 1
            for flow in self.problem.flows
            for user in flow.consumers
        )

    def _place(self, unit: int) -> int:
        return int(self._inside[:, unit].argmax())

    def assign(self, path: Sequence[int], classes: Sequence[int]) -> Assignment:
        """The partition whose stages 0 .. s are the down-set number `path[s]`."""
        stages = self._inside[list(path)].argmax(axis=0)
        return Assignment(tuple(int(stage) for stage in stages), tuple(classes))


class _Search:
    """The tables of one search: down-sets, a number of stages, device orders."""

    def __init__(self, sets: DownSets, num_stages: int, orders: DeviceOrders) -> None:
        self.sets = sets
        self.problem = sets.problem
        self.num_stages = num_stages
        self.orders = orders
        self.additive = functools.cache(self._additive)
        self.bottleneck = functools.cache(self._bottleneck)
        self._fits = functools.cache(self._memory_fits)
        self._under = functools.lru_cache(maxsize=16)(self._is_under)
        self.stage_matters = bool(self.problem.stage_pins)

    def _additive(self, cls: int, before: int) -> Table:
        link = self.problem.links[before][cls]
        table = self.sets.compute[self.problem.classes[cls].type] + self.sets.sync
        return table + self.sets.transfers(0, link) + self.sets.transfers(1, link)

    def _bottleneck(self, cls: int, before: int) -> Table:
        link = self.problem.links[before][cls]
        table = self.sets.compute[self.problem.classes[cls].type] + self.sets.held
        for way in (0, 1):
            table = np.maximum(table, self.sets.transfers(way, link))
        return table

    def _memory_fits(self, cls: int, in_flight: int, stage: int) -> NDArray[np.bool_]:
        table = self.sets.fitting(in_flight, self.problem.classes[cls].memory_bytes)
        for unit, pinned in self.problem.class_pins:
            if pinned != cls:
                table = table & ~self.sets.touched((unit,))
        for unit, wanted in self.problem.stage_pins:
            touched = self.sets.touched((unit,))
            table = table & (touched if wanted == stage else ~touched)
        return table

    def _is_under(self, cls: int, before: int, threshold: float) -> NDArray[np.bool_]:
        table: NDArray[np.bool_] = self.bottleneck(cls, before) <= threshold
        return table

    def fits(self, cls: int, stage: int) -> NDArray[np.bool_]:
        """Which differences stage `stage` may be on a device of class `cls`."""
        in_flight = self.problem.in_flight(self.num_stages, stage)
        return self._fits(cls, in_flight, stage if self.stage_matters else -1)

    def run(self, cost: Callable[[int, int], Table], join: np.ufunc, threshold: float) -> _Path:
        """Least `join` of stage costs over all partitions under `threshold`."""
        start = np.full(self.sets.size, math.inf)
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
                    origin[target] = (
                        np.where(better, first, starts),
                        np.where(better, number, numbers),
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
        end = self.search.sets.size - 1
        ends, classes = [], []
        for stage in reversed(range(self.search.num_stages)):
            starts, numbers = self.trail[stage][state]
            start, number = int(starts[end]), int(numbers[end])
            state, _, cls, _ = self.search.orders.arcs[stage][number]
            ends.append(end)
            classes.append(cls)
            end = start
        return self.search.sets.assign(ends[::-1], classes[::-1])


def outlook(sets: DownSets, max_stages: int) -> tuple[float, ...]:
    """Lower bounds of the step time of partitions of these down-sets into 1, 2, .. stages.

    For a problem with one class of devices: the least bottleneck and the least additive cost,
    each by itself, from the last stage to the first, so that one pass serves all numbers of
    stages (in-flight microbatches depend on the distance to the last stage only). Infinite where
    nothing fits in memory. Pins of stages and what the optimizer costs are left out.
    """
    problem = sets.problem
    (device,) = problem.classes
    (link,) = problem.links[0]
    transfers = sets.transfers(0, link), sets.transfers(1, link)
    compute = sets.compute[device.type]
    bottleneck = np.maximum(compute + sets.held, np.maximum(*transfers))
    additive = compute + transfers[0] + transfers[1] + sets.sync
    low = free = np.where(np.arange(sets.size) == sets.size - 1, 0.0, math.inf)
    bounds = []
    for tail in range(1, max_stages + 1):
        fits = sets.fitting(problem.in_flight(tail, 0), device.memory_bytes)
        low = np.where(fits, np.maximum(bottleneck, low[None, :]), math.inf).min(axis=1)
        free = np.where(fits, additive + free[None, :], math.inf).min(axis=1)
        repeated = (problem.num_microbatches - 1) * float(low[0]) if low[0] < math.inf else math.inf
        bounds.append(float(free[0]) + repeated)
    return tuple(bounds)


def search_chains(
    sets: DownSets,
    num_stages: int,
    orders: DeviceOrders,
    *,
    cutoff: float,
    num_thresholds: int,
) -> ChainResult:
    """Best partition into exactly `num_stages` stages, searched for what beats `cutoff` seconds.

    The lower bound covers all partitions of these down-sets over `orders`, with what the optimizer
    costs left out; it is infinite if none fits in memory.
    """
    problem = sets.problem
    search = _Search(sets, num_stages, orders)
    least = search.run(search.bottleneck, np.maximum, math.inf).value
    if math.isinf(least):
        return ChainResult(None, math.inf, math.inf)
    free = search.run(search.additive, np.add, math.inf)
    best: Assignment | None = None
    seconds, bound = math.inf, math.inf
    repeats = problem.num_microbatches - 1
    for low, high in _brackets(least, num_thresholds) if repeats else ((0.0, math.inf),):
        path = search.run(search.additive, np.add, high * _EXACT)
        found = path.assignment()
        total = step_seconds(problem, found)
        if total < seconds and excess_bytes(problem, found) <= 0:
            best, seconds = found, total
        bound = min(bound, path.value + repeats * low)
        rest = free.value + repeats * high if repeats else math.inf
        if rest >= min(seconds, cutoff) or path.value <= free.value * _EXACT:
            return ChainResult(best, seconds, min(bound, rest))
    return ChainResult(best, seconds, bound)


def _brackets(least: float, count: int) -> Iterator[tuple[float, float]]:
    """Consecutive brackets of bottlenecks, the first one the single value `least`."""
    yield least, least
    low, step = least, _STEP
    for number in range(count):
        if number % 10 == 9:
            step *= 2
        yield low, low * (1 + step)
        low *= 1 + step
    yield low, math.inf
