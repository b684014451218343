"""Filling devices one after another along an order of units: the greedy placement."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .feasibility import MEMORY_TOLERANCE
from .problem import PlacementProblem

__all__ = ["filled"]


def filled(
    units: PlacementProblem, order: Sequence[int], slots: Sequence[int], most: float
) -> list[int] | None:
    """Slots one after another, each filled along the order up to a load and its memory; None: some
    unit finds no place. What the present slot does not support goes to a later one at once."""
    limits = (units.memory * (1 + MEMORY_TOLERANCE)).tolist()
    times, sizes = units.times.tolist(), units.sizes.tolist()
    load, used = [0.0] * len(slots), [0.0] * len(slots)
    slot_of = [-1] * units.num_units
    place = 0

    def fits(number: int, unit: int) -> bool:
        kind = units.slots[slots[number]]
        within = load[number] + times[unit][kind] <= most and math.isfinite(times[unit][kind])
        return within and used[number] + sizes[unit] <= limits[kind]

    for unit in order:
        number = place
        while number < len(slots) and not fits(number, unit):
            number += 1
        if number == len(slots):
            return None
        kind = units.slots[slots[place]]
        if math.isfinite(times[unit][kind]) and sizes[unit] <= limits[kind]:
            place = number  # the present slot is full
        load[number] += times[unit][units.slots[slots[number]]]
        used[number] += sizes[unit]
        slot_of[unit] = slots[number]
    return slot_of
