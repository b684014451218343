"""Filling devices one after another along an order of units: the greedy placement."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .feasibility import MEMORY_TOLERANCE
from .problem import PlacementProblem

__all__ = ["filled"]


def filled(
    units: PlacementProblem,
    order: Sequence[int],
    slots: Sequence[int],
    most: float,
    *,
    num_hosts: int = 0,
) -> list[int] | None:
    """A slot of every unit, slots being filled one after another; None: some unit finds no place.

    A slot is full when the next unit exceeds its memory or a load of `most`. What a slot does not
    support goes to a later one at once. Units follow each other through the slots where arcs ask
    for it, so that pieces are contiguous.

    Args:
        order: units in a topological order.
        slots: in the order in which they are filled.
        num_hosts: how many of the slots, the last ones, hold single operators rather than a piece.
    """
    filling = _Filling(units, slots, most, len(slots) - num_hosts)
    before: list[list[int]] = [[] for _ in range(units.num_units)]
    for u, v in units.arcs:
        before[v].append(u)
    place = 0
    for unit in order:
        number = max(place, filling.lowest(before[unit]))
        while number < len(slots) and not filling.fits(number, unit):
            number += 1
        if number == len(slots):
            return None
        if filling.could_take(place, unit) and filling.lowest(before[unit]) <= place:
            place = number  # the present slot is full
        filling.put(unit, number, before[unit])
    return filling.slot_of


class _Filling:
    """Loads and memory of slots, by their number in the order of filling."""

    def __init__(
        self, units: PlacementProblem, slots: Sequence[int], most: float, num_pieces: int
    ) -> None:
        self.slots, self.most, self.num_pieces = slots, most, num_pieces
        self.limits = (units.memory * (1 + MEMORY_TOLERANCE)).tolist()
        self.times, self.sizes = units.times.tolist(), units.sizes.tolist()
        self.kinds = [units.slots[slot] for slot in slots]
        self.load, self.used = [0.0] * len(slots), [0.0] * len(slots)
        self.slot_of = [-1] * units.num_units
        self.number = [-1] * units.num_units
        self.above = [-1] * units.num_units  # last piece that the unit comes after

    def lowest(self, producers: Sequence[int]) -> int:
        """First slot that keeps pieces contiguous: not one that is left and entered again."""
        return max((self._next(u) for u in producers), default=0)

    def _next(self, u: int) -> int:
        return self.number[u] if self.number[u] < self.num_pieces else self.above[u] + 1

    def could_take(self, number: int, unit: int) -> bool:
        kind = self.kinds[number]
        return math.isfinite(self.times[unit][kind]) and self.sizes[unit] <= self.limits[kind]

    def fits(self, number: int, unit: int) -> bool:
        kind = self.kinds[number]
        return (
            self.could_take(number, unit)
            and self.load[number] + self.times[unit][kind] <= self.most
            and self.used[number] + self.sizes[unit] <= self.limits[kind]
        )

    def put(self, unit: int, number: int, producers: Sequence[int]) -> None:
        self.load[number] += self.times[unit][self.kinds[number]]
        self.used[number] += self.sizes[unit]
        self.slot_of[unit], self.number[unit] = self.slots[number], number
        self.above[unit] = max(map(self._last, producers), default=-1)

    def _last(self, u: int) -> int:
        return self.number[u] if self.number[u] < self.num_pieces else self.above[u]
