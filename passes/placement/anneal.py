"""Simulated annealing of placements by moves and exchanges of single units.

It lowers a power sum of loads, which stands for the largest load but also sees progress on the
others; the placement with the least largest load on the way is kept.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence

from .intervals import Pieces
from .load_table import LoadTable
from .problem import PlacementProblem

__all__ = ["anneal", "anneal_pieces", "annealing_seconds"]

_POWER = 24.0
_START, _END = 0.01, 0.0001  # temperature, in power sums of one device at the mean of the start
_CHECK = 64  # moves between looks at the clock
_MOST_MOVES_PER_UNIT = 3000
_MOVES_A_SECOND = 40_000  # fewer than are made in a second, so that the clock rarely matters

Targets = Callable[[LoadTable, int], Sequence[int]]
"""Slots to which a unit of the table may go at present; its own is left out by the caller."""


def anneal(
    problem: PlacementProblem,
    slot_of: Sequence[int],
    *,
    seconds: float,
    at_most: float,
    seed: int = 0,
) -> tuple[list[int], float]:
    """Improve a placement that need not be contiguous; the best one and its largest load.

    Args:
        seconds: decides the number of moves.
        at_most: seconds after which it ends before its moves are made.
    """
    slots = range(problem.num_devices)

    def anywhere(table: LoadTable, unit: int) -> Sequence[int]:
        return slots

    return _Annealing(problem, slot_of, anywhere, seed, exchanges=True).run(seconds, at_most)


def anneal_pieces(
    problem: PlacementProblem, pieces: Pieces, *, seconds: float, at_most: float, seed: int = 0
) -> tuple[Pieces, float]:
    """Improve contiguous pieces, keeping which device follows which; times as in `anneal`."""
    stage = [0] * problem.num_devices
    for number, slot in enumerate(pieces.sequence):
        stage[slot] = number
    before: list[list[int]] = [[] for _ in range(problem.num_units)]
    after: list[list[int]] = [[] for _ in range(problem.num_units)]
    for u, v in problem.arcs:
        after[u].append(v)
        before[v].append(u)

    def between_neighbours(table: LoadTable, unit: int) -> Sequence[int]:
        first = max((stage[table.slot_of[u]] for u in before[unit]), default=0)
        last = min((stage[table.slot_of[v]] for v in after[unit]), default=len(stage) - 1)
        return pieces.sequence[first : last + 1]

    search = _Annealing(problem, pieces.slot_of, between_neighbours, seed, exchanges=False)
    slot_of, value = search.run(seconds, at_most)
    return Pieces(tuple(slot_of), pieces.sequence), value


def annealing_seconds(problem: PlacementProblem, seconds: float) -> float:
    """What the moves of the given time come to, which are fewer for small problems."""
    return min(seconds, _MOST_MOVES_PER_UNIT * problem.num_units / _MOVES_A_SECOND)


class _Annealing:
    def __init__(
        self,
        problem: PlacementProblem,
        slot_of: Sequence[int],
        targets: Targets,
        seed: int,
        *,
        exchanges: bool,
    ) -> None:
        self.problem, self.targets, self.exchanges = problem, targets, exchanges
        self.table = LoadTable(problem, slot_of)
        self.random = random.Random(seed)
        self.best, self.value = list(slot_of), self.table.value
        self.norm = self.value or 1.0
        self.on: list[list[int]] = [[] for _ in self.table.load]
        self.index = [0] * problem.num_units
        for unit, slot in enumerate(slot_of):
            self.index[unit] = len(self.on[slot])
            self.on[slot].append(unit)

    def run(self, seconds: float, at_most: float) -> tuple[list[int], float]:
        """Cool down over the moves of the given time."""
        end = time.monotonic() + at_most
        moves = int(_MOVES_A_SECOND * annealing_seconds(self.problem, seconds))
        temperature = _START
        for number in range(moves):
            if number % _CHECK == 0:
                if time.monotonic() > end:
                    break
                temperature = _START * (_END / _START) ** (number / moves)
            if self.exchanges and number % 3 == 0:
                self._exchange(temperature)
            else:
                self._move(temperature)
            if (value := self.table.value) < self.value * (1 - 1e-12):
                self.value, self.best = value, list(self.table.slot_of)
        return self.best, LoadTable(self.problem, self.best).value

    def _move(self, temperature: float) -> None:
        unit = self._pick()
        slot = self._target(unit)
        table = self.table
        here = table.slot_of[unit]
        if slot == here or not table.fits(unit, slot):
            return
        left, got = table.after(unit, slot)
        rise = self._energy(left, got) - self._energy(table.load[here], table.load[slot])
        if self._accepts(rise, temperature):
            self._apply(unit, slot)

    def _exchange(self, temperature: float) -> None:
        """A unit to another slot, and one from there back."""
        unit = self._pick()
        slot = self._target(unit)
        table = self.table
        here = table.slot_of[unit]
        if slot == here or not self.on[slot]:
            return
        other = self.random.choice(self.on[slot])
        before = self._energy(table.load[here], table.load[slot])
        if not self._legal_exchange(unit, other):
            return
        table.move(unit, slot)
        left, got = table.after(other, here)
        rise = self._energy(left, got) - before
        table.move(unit, here)
        if self._accepts(rise, temperature):
            self._apply(unit, slot)
            self._apply(other, here)

    def _legal_exchange(self, unit: int, other: int) -> bool:
        table = self.table
        here, there = table.slot_of[unit], table.slot_of[other]
        change = table.sizes[unit] - table.sizes[other]
        return (
            table.times[unit][table.kind[there]] != math.inf
            and table.times[other][table.kind[here]] != math.inf
            and table.used[there] + change <= table.limits[there]
            and table.used[here] - change <= table.limits[here]
        )

    def _pick(self) -> int:
        """A unit, half of the time one of the most loaded slot."""
        if self.random.random() < 0.5:
            load = self.table.load
            units = self.on[max(range(len(load)), key=load.__getitem__)]
            if units:
                return units[int(self.random.random() * len(units))]
        return int(self.random.random() * self.problem.num_units)

    def _target(self, unit: int) -> int:
        """A slot that the unit may go to, half of the time one that shares a net with it."""
        slots = self.targets(self.table, unit)
        nets = self.problem.nets_of[unit]
        if nets and self.random.random() < 0.5:
            pins = self.problem.pins[nets[int(self.random.random() * len(nets))]]
            slot = self.table.slot_of[pins[int(self.random.random() * len(pins))]]
            if slot in slots:
                return slot
        return slots[int(self.random.random() * len(slots))] if slots else self.table.slot_of[unit]

    def _energy(self, *loads: float) -> float:
        return sum(
            math.exp(min(_POWER * math.log(load / self.norm), 300.0)) for load in loads if load > 0
        )

    def _accepts(self, rise: float, temperature: float) -> bool:
        return rise <= 0 or self.random.random() < math.exp(-rise / temperature)

    def _apply(self, unit: int, slot: int) -> None:
        row = self.on[self.table.slot_of[unit]]
        last, place = row[-1], self.index[unit]
        row[place], self.index[last] = last, place
        row.pop()
        self.index[unit] = len(self.on[slot])
        self.on[slot].append(unit)
        self.table.move(unit, slot)
