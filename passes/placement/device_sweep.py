"""The least load of one device for what it holds, found for all amounts in one sweep over units.

Units have whole prices. For every sum of prices up to a limit, the sweep finds the least load of a
device whose units have that sum: their times, and the fees of nets of which it holds some pins but
not all. Units come one after another in an order; a state says of every net that is open (some pins
have come, some not) whether the device holds none, all or some of the pins so far, as more cannot
matter for what comes. Orders in which few nets are open at a time have few states.

Where there are too many, the cheapest open net is forgotten: what it still costs is not counted, so
that loads are lower bounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .problem import Floats, Integers, PlacementProblem

__all__ = ["DeviceSweep"]

_NONE, _ALL, _SOME = 0, 1, 2  # of a net's pins so far are held
_State = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Step:
    """One unit: how states come about when it is left out (0) or held (1).

    Args:
        time: load of the unit itself.
        sources: for both, [ways, states] state before; `num_before`, which is none, where a state
            has fewer ways.
        fees: for both, [ways, states] what nets cost that the step cuts.
    """

    unit: int
    time: float
    num_before: int
    sources: tuple[Integers, Integers]
    fees: tuple[Floats, Floats]


class DeviceSweep:
    """All sweeps over the units of a problem in one order, for a device of one kind.

    Args:
        order: all units.
        most_states: nets are forgotten above.
    """

    def __init__(
        self, problem: PlacementProblem, kind: int, order: Sequence[int], *, most_states: int
    ) -> None:
        self.forgotten = 0
        self.steps: list[_Step] = []
        self._build(problem, kind, order, most_states)
        self._chosen: list[npt.NDArray[np.int16]] = []
        self._saturated: list[Integers] = []
        self._prices: list[int] = []

    @property
    def num_states(self) -> int:
        """States of all steps together, which the time of a sweep is proportional to."""
        return sum(step.sources[0].shape[1] for step in self.steps)

    def _build(
        self, problem: PlacementProblem, kind: int, order: Sequence[int], most_states: int
    ) -> None:
        fees: list[float] = problem.fees[:, kind].tolist()
        left = [len(pins) for pins in problem.pins]
        forgotten: set[int] = {net for net, fee in enumerate(fees) if fee <= 0}
        opened: list[int] = []
        states: dict[_State, int] = {(): 0}
        for unit in order:
            nets = [net for net in problem.nets_of[unit] if net not in forgotten]
            for net in nets:
                left[net] -= 1
            after = [*opened, *(net for net in nets if net not in opened)]
            after = [net for net in after if left[net]]
            time = float(problem.times[unit, kind])
            while True:
                ways = _ways(states, opened, after, nets, fees, held=np.isfinite(time))
                found = {state: n for n, state in enumerate(sorted({way[0] for way in ways}))}
                if len(found) <= most_states:
                    break
                cheapest = min(after, key=lambda net: (fees[net], net))
                after.remove(cheapest)
                forgotten.add(cheapest)
                self.forgotten += 1
            self.steps.append(_step(unit, time, len(states), found, ways))
            states, opened = found, after

    def least_loads(self, prices: Sequence[int], highest: int) -> Floats:
        """[highest + 1] least load of a device whose units have that sum of prices; the last: that
        sum or more; inf: no units have that sum.

        Args:
            prices: of every unit, at least 0.
        """
        self._prices = list(prices)
        self._chosen, self._saturated = [], []
        best = np.full((2, highest + 1), np.inf)  # the last row is no state
        best[0, 0] = 0.0
        for step in self.steps:
            best = self._advanced(step, best, highest)
        least: Floats = best[0]
        return least

    def _advanced(self, step: _Step, best: Floats, highest: int) -> Floats:
        count = step.sources[0].shape[1]
        after = np.full((count + 1, highest + 1), np.inf)
        chosen = np.zeros((count, highest + 1), dtype=np.int16)
        came_from = np.full(count, highest)
        price = self._prices[step.unit]
        way = 0
        for held in (0, 1):
            for sources, fees in zip(step.sources[held], step.fees[held], strict=True):
                loads = best[sources]
                if fees.any():
                    loads += fees[:, None]
                before = np.full(count, highest)
                if held:
                    loads += step.time
                    if price:
                        loads, before = _shifted(loads, price)
                better = loads < after[:count]
                np.copyto(after[:count], loads, where=better)
                chosen[better] = way
                came_from[better[:, -1]] = before[better[:, -1]]
                way += 1
        self._chosen.append(chosen)
        self._saturated.append(came_from)
        return after

    def units_held(self, price: int) -> list[int]:
        """Units with the least load for a sum of prices, in the last sweep, ascending."""
        state, held = 0, []
        for step, chosen, came_from in zip(
            reversed(self.steps), reversed(self._chosen), reversed(self._saturated), strict=True
        ):
            way, before = int(chosen[state, price]), int(came_from[state])
            saturated = price == chosen.shape[1] - 1
            left_out = len(step.sources[0])
            if way >= left_out:
                held.append(step.unit)
                price = before if saturated else price - self._prices[step.unit]
                state = int(step.sources[1][way - left_out, state])
            else:
                state = int(step.sources[0][way, state])
        return sorted(held)


def _ways(
    states: dict[_State, int],
    opened: list[int],
    after: list[int],
    nets: list[int],
    fees: list[float],
    *,
    held: bool,
) -> list[tuple[_State, int, int, float]]:
    """(State after, number of the state before, whether the unit is held, fee) of all choices."""
    ways = []
    for state, number in states.items():
        before = dict(zip(opened, state, strict=True))
        for hold in (_NONE, _ALL) if held else (_NONE,):
            now, fee = dict(before), 0.0
            for net in nets:
                was = before.get(net)
                if was is None:
                    now[net] = hold
                elif was not in (_SOME, hold):
                    now[net] = _SOME
                    fee += fees[net]
            ways.append((tuple(now[net] for net in after), number, hold, fee))
    return ways


def _step(
    unit: int,
    time: float,
    num_before: int,
    found: dict[_State, int],
    ways: list[tuple[_State, int, int, float]],
) -> _Step:
    into: tuple[list[list[tuple[int, float]]], ...] = ([[] for _ in found], [[] for _ in found])
    for state, before, hold, fee in ways:
        into[hold][found[state]].append((before, fee))
    sources, fees = [], []
    for rows in into:
        most = max(map(len, rows))
        source = np.full((most, len(found)), num_before, dtype=np.int64)
        paid = np.zeros((most, len(found)))
        for number, row in enumerate(rows):
            for way, (before, fee) in enumerate(row):
                source[way, number], paid[way, number] = before, fee
        sources.append(source)
        fees.append(paid)
    finite = time if np.isfinite(time) else 0.0
    return _Step(unit, finite, num_before, (sources[0], sources[1]), (fees[0], fees[1]))


def _shifted(loads: Floats, price: int) -> tuple[Floats, Integers]:
    """Loads at sums that are larger by a price, and the sum from which the last one came."""
    last = loads.shape[1] - 1
    moved = np.full_like(loads, np.inf)
    moved[:, price:last] = loads[:, : max(last - price, 0)]
    lowest = max(last - price, 0)
    source = lowest + loads[:, lowest:].argmin(axis=1)
    moved[:, last] = loads[np.arange(len(loads)), source]
    return moved, source
