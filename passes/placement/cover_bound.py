"""A bound on free placements from what single devices can hold, by column generation.

Whoever has prices p >= 0 of units has a bound: where devices of kind k can hold units of at most
P_k(T) within a load of T, all devices together hold at most sum of n_k P_k(T). If that is less than
the sum of all prices, no placement has a largest load of T. Unlike bounds from work, this counts
what devices pay for the results that they cut. P_k is found exactly, for all T at once, by a sweep
over the units (`device_sweep`).

Good prices for a T are the dual values of covering: of all sets S of units that devices can hold
within T,

    minimise z  subject to  sum over sets S that have v of x[S] >= 1          for every unit v
                            sum over sets S of kind k of x[S] <= n_k z        for every kind k

which is solved over the sets known so far; the set worth most at its prices is the next one known.
To keep prices from leaping about they are mixed with the best ones so far (Wentges 1997). Prices
are rounded to whole numbers before a sweep, so that what it proves needs no tolerance of a solver.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np

from .device_sweep import DeviceSweep
from .incumbent import Incumbent
from .orders import topological_orders
from .problem import Floats, PlacementProblem
from .reduce import Reduced, below
from .work_bound import work_bound

__all__ = ["DeviceCovers"]

_METHOD = "covers by devices"
_MOST_ORDERS = 8
_MOST_STATES = 1500  # of one step of a sweep
_MOST_CELLS = 1.5e8  # states x prices of a sweep; about four seconds
_PRICE_CELLS = 300  # whole prices that an even share of all units has
_HIGHEST_SHARE = 1.5  # of a kind's share of the work, above which amounts are not told apart
_LEAST_SHARE = 0.2  # of an even share, below which no kind's share is taken to be
_TAKEN_EACH = 3  # sets of a sweep
_LARGEST_PRICE = 20.0  # times the work, above which a unit may rather stay uncovered
_LEAST_WORK = 0.02  # of the mean
_SETTLED, _MIXED_AT_FIRST, _MIXED = 5, 0.9, 0.7  # iterations, and share of the best prices
_MOST_STALLED = 100  # sweeps without better prices
_ROUNDING = 1e-9  # relative; sums of floats
_NARROW = 2e-3  # relative; gaps below are left


class _Outcome(Enum):
    PROVEN = "no placement"
    COVERED = "fractions of sets cover all units"
    STALLED = "prices do not get better"
    UNFINISHED = "time is over"


@dataclass(frozen=True, slots=True)
class _Set:
    """Units of the original problem that a device of a kind holds."""

    kind: int
    units: frozenset[int]


class DeviceCovers:
    """Sets that devices of a problem can hold, and bounds from them; a search keeps one.

    Args:
        pieced: the contiguous problem of the same workload, which orders are made of.
    """

    def __init__(self, problem: PlacementProblem, pieced: PlacementProblem) -> None:
        self.problem = problem
        self._pieced = pieced
        self._orders: list[list[int]] = []
        self._known: list[_Set] = []
        self._unproven = math.inf  # the least limit that was asked for in vain
        self._exhausted = False

    def prove(self, best: Incumbent, *, share: float, halve: bool) -> None:
        """Raise the bound of a search as far as it goes until a share of its time is over.

        Args:
            halve: where the value, less the gap that is allowed, cannot be proven, prove what is
                in the middle between it and the bound, and so on; else give up.
        """
        low, high = best.bound, best.value * (1 - max(0.9 * best.gap, 1e-6))
        limit = high
        if limit >= self._unproven:
            high = self._unproven
            limit = (low + high) / 2
        while not (self._exhausted or best.done) and best.left(share) > 0 and low < limit:
            answer = self._search(limit, best, share)
            if answer is None:
                break
            outcome, bound = answer
            improved = best.prove(min(bound, limit), _METHOD)
            if outcome is _Outcome.UNFINISHED:
                break
            if outcome is _Outcome.PROVEN:
                low = limit
            else:
                # prices that get no better than work do not at lower limits either
                self._exhausted = outcome is _Outcome.STALLED and not improved
                low, high = max(low, best.bound), limit
                self._unproven = limit
            if not halve or high - low < _NARROW * high:
                break
            limit = (low + high) / 2

    def _search(self, limit: float, best: Incumbent, share: float) -> tuple[_Outcome, float] | None:
        """The outcome for a limit, and a bound; None: sweeps would take too long."""
        reduced = below(self.problem, limit * (1 + _ROUNDING), contiguous=False)
        if reduced is None:
            return _Outcome.PROVEN, limit
        if not self._orders:
            self._orders = _orders(self._pieced)
        cover = _Cover.made(self.problem, reduced, self._orders, limit)
        if cover is None:
            return None
        return cover.search(self._known, best, share)


def _orders(pieced: PlacementProblem) -> list[list[int]]:
    """Operators in the orders that sweeps are tried in."""
    return [
        [operator for unit in order for operator in pieced.members[unit]]
        for order in topological_orders(pieced, count=_MOST_ORDERS)
    ]


def _best_order(problem: PlacementProblem, orders: Sequence[Sequence[int]]) -> list[int]:
    """Units in the order of their first operators in which fewest nets are open at a time."""
    found: tuple[float, list[int]] | None = None
    unit_of = {v: unit for unit, members in enumerate(problem.members) for v in members}
    for order in orders:
        units = list(dict.fromkeys(unit_of[operator] for operator in order))
        place = {unit: number for number, unit in enumerate(units)}
        change = np.zeros(len(units) + 1)
        for pins in problem.pins:
            places = [place[unit] for unit in pins]
            change[min(places)] += 1
            change[max(places)] -= 1
        states = float((2.0 ** np.minimum(np.cumsum(change), 60)).sum())
        if found is None or states < found[0]:
            found = states, units
    assert found is not None, "there is always an order"
    return found[1]


@dataclass
class _Cover:
    """The covering programme of one limit, over the units of the problem reduced below it."""

    original: PlacementProblem
    reduced: Reduced
    order: list[int]
    limit: float
    sweeps: list[DeviceSweep]
    highest: list[int]  # amount of each kind above which amounts are not told apart

    @classmethod
    def made(
        cls,
        original: PlacementProblem,
        reduced: Reduced,
        orders: Sequence[Sequence[int]],
        limit: float,
    ) -> _Cover | None:
        """None: sweeps are too large to be worth their time."""
        problem = reduced.problem
        order = _best_order(problem, orders)
        kinds = range(len(problem.counts))
        sweeps = [DeviceSweep(problem, k, order, most_states=_MOST_STATES) for k in kinds]
        shares = work_bound(problem).weights * problem.num_devices
        highest = [
            math.ceil(_PRICE_CELLS * _HIGHEST_SHARE * max(share, _LEAST_SHARE))
            for share in shares.tolist()
        ]
        cells = sum(s.num_states * most for s, most in zip(sweeps, highest, strict=True))
        if cells > _MOST_CELLS:
            return None
        return cls(original, reduced, order, limit, sweeps, highest)

    def search(self, known: list[_Set], best: Incumbent, share: float) -> tuple[_Outcome, float]:
        """Whether the limit is proven, and the best bound on the reduced problem.

        Args:
            known: sets that other limits came to; gets those of this one.
            best: its time is kept to, until a share of it is over.
        """
        problem = self.reduced.problem
        programme = _Programme(problem)
        for one in known:
            units = self._reduced_units(one)
            if units is not None:
                programme.add(one.kind, units)
        work = work_bound(problem).work
        even = work / work.sum() if work.sum() > 0 else np.full(len(work), 1 / len(work))
        prices, centre, worth = even, even, 0.0
        bound, mixed = 0.0, 1.0
        sweeps = stalled = 0
        while True:
            whole, pieces = self._whole(prices)
            proven, now_worth, found = self._sweep(whole, pieces)
            bound = max(bound, proven)
            stalled = 0 if now_worth > worth else stalled + 1
            if now_worth > worth:
                centre, worth = prices, now_worth
            if bound >= self.limit:
                return _Outcome.PROVEN, bound
            added = False
            for kind, units in found:
                if programme.add(kind, units):
                    added = True
                    known.append(_Set(kind, self._original_units(units)))
            duals, value = programme.solve()
            if value <= 1:
                return _Outcome.COVERED, bound
            settled = not added and not mixed
            if settled or stalled > _MOST_STALLED or not duals.any():
                return _Outcome.STALLED, bound
            if best.left(share) <= 0:
                return _Outcome.UNFINISHED, bound
            sweeps += 1
            mixed = 0.0
            if added:
                mixed = _MIXED if sweeps > _SETTLED else _MIXED_AT_FIRST
            prices = mixed * centre + (1 - mixed) * duals / duals.sum()

    def _whole(self, prices: Floats) -> tuple[list[int], int]:
        """Whole prices, by rounding their sums along the order, and their sum."""
        total = _PRICE_CELLS * self.reduced.problem.num_devices
        along = prices[self.order]
        sums = np.round(np.cumsum(along) / along.sum() * total).astype(np.int64)
        whole = np.zeros(len(prices), dtype=np.int64)
        whole[self.order] = np.diff(sums, prepend=0)
        return whole.tolist(), int(whole.sum())

    def _sweep(
        self, prices: list[int], total: int
    ) -> tuple[float, float, list[tuple[int, list[int]]]]:
        """The bound at prices, what they are worth at the limit (above 1: proven), and sets."""
        loads = [
            sweep.least_loads(prices, highest)
            for sweep, highest in zip(self.sweeps, self.highest, strict=True)
        ]
        worth = total / max(1, self._held(loads, self.limit * (1 + _ROUNDING), total))
        bound = self._least_limit(loads, total)
        sets = []
        for kind, (sweep, row) in enumerate(zip(self.sweeps, loads, strict=True)):
            possible = np.flatnonzero(row <= self.limit)[::-1][:_TAKEN_EACH]
            sets += [(kind, sweep.units_held(int(amount))) for amount in possible if amount]
        return bound, worth, sets

    def _held(self, loads: list[Floats], limit: float, total: int) -> int:
        """Most that all devices can hold within a limit."""
        held = 0
        for row, count in zip(loads, self.reduced.problem.counts, strict=True):
            most = int(np.flatnonzero(row <= limit)[-1])
            held += count * (most if most < len(row) - 1 else total)
        return held

    def _least_limit(self, loads: list[Floats], total: int) -> float:
        """The largest limit that devices cannot hold everything within, rounded down."""
        limits = np.unique(np.concatenate([row[np.isfinite(row)] for row in loads]))
        low, high = 0, len(limits)
        while low < high:
            middle = (low + high) // 2
            if self._held(loads, float(limits[middle]), total) >= total:
                high = middle
            else:
                low = middle + 1
        least = float(limits[low]) if low < len(limits) else math.inf
        return least * (1 - _ROUNDING)

    def _original_units(self, units: Sequence[int]) -> frozenset[int]:
        inside = set(units)
        label = self.reduced.label
        return frozenset(unit for unit, merged in enumerate(label) if merged in inside)

    def _reduced_units(self, one: _Set) -> list[int] | None:
        """A known set's units here; None: it has parts of some, or takes longer than the limit."""
        units = {self.reduced.label[unit] for unit in one.units}
        if self._original_units(sorted(units)) != one.units:
            return None
        problem = self.reduced.problem
        load = float(problem.times[sorted(units), one.kind].sum())
        nets = {net for unit in units for net in problem.nets_of[unit]}
        load += sum(
            float(problem.fees[net, one.kind])
            for net in sorted(nets)
            if not units.issuperset(problem.pins[net])
        )
        return sorted(units) if load <= self.limit else None


class _Programme:
    """The covering programme over known sets, solved again after each that is added.

    A unit may stay uncovered at a price, so that there always is a solution.
    """

    def __init__(self, problem: PlacementProblem) -> None:
        from ortools.linear_solver import pywraplp  # type: ignore[attr-defined]

        self.solver: Any = pywraplp.Solver.CreateSolver("GLOP")
        infinity = self.solver.infinity()
        self.z = self.solver.NumVar(0, infinity, "z")
        self.objective = self.solver.Objective()
        self.objective.SetMinimization()
        self.objective.SetCoefficient(self.z, 1.0)
        work = work_bound(problem).work
        work = work + _LEAST_WORK * float(work.mean()) + 1e-12
        self.covered = []
        for unit, least in enumerate((work / work.sum()).tolist()):
            row = self.solver.Constraint(1.0, infinity, f"covered_{unit}")
            missing = self.solver.NumVar(0, infinity, f"missing_{unit}")
            row.SetCoefficient(missing, 1.0)
            self.objective.SetCoefficient(missing, _LARGEST_PRICE * least)
            self.covered.append(row)
        self.devices = []
        for kind, count in enumerate(problem.counts):
            row = self.solver.Constraint(-infinity, 0.0, f"devices_{kind}")
            row.SetCoefficient(self.z, -count)
            self.devices.append(row)
        self.known: set[tuple[int, tuple[int, ...]]] = set()

    def add(self, kind: int, units: Sequence[int]) -> bool:
        """Make a set known; whether it was not."""
        key = kind, tuple(units)
        if key in self.known:
            return False
        self.known.add(key)
        used = self.solver.NumVar(0, self.solver.infinity(), f"x_{len(self.known)}")
        self.devices[kind].SetCoefficient(used, 1.0)
        for unit in units:
            self.covered[unit].SetCoefficient(used, 1.0)
        return True

    def solve(self) -> tuple[Floats, float]:
        """Prices of units, and the objective; no prices where the solver has no answer."""
        if self.solver.Solve() != self.solver.OPTIMAL:
            return np.zeros(len(self.covered)), math.inf
        duals = np.array([max(0.0, row.dual_value()) for row in self.covered])
        return duals, float(self.objective.Value())
