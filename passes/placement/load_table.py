"""Loads of devices under moves of single units, kept up to date at the cost of the unit's nets."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .feasibility import MEMORY_TOLERANCE
from .problem import PlacementProblem

__all__ = ["LoadTable"]


class LoadTable:
    """A slot of every unit, with the load and bytes of every slot.

    Moving one unit from slot a to slot b changes the loads of a and b only: whether a net is cut
    changes only where all its pins are, or come to be, on a or on b.
    """

    def __init__(self, problem: PlacementProblem, slot_of: Sequence[int]) -> None:
        self.problem = problem
        self.slot_of = list(slot_of)
        self.kind = problem.slots
        self.times: list[list[float]] = problem.times.tolist()
        self.sizes: list[float] = problem.sizes.tolist()
        self.fees: list[list[float]] = problem.fees.tolist()
        self.limits = [
            float(limit * (1 + MEMORY_TOLERANCE)) for limit in problem.memory[list(self.kind)]
        ]
        self.pins_on: list[dict[int, int]] = []
        self.load = [0.0] * problem.num_devices
        self.used = [0.0] * problem.num_devices
        self._count()

    def _count(self) -> None:
        for unit, slot in enumerate(self.slot_of):
            self.load[slot] += self.times[unit][self.kind[slot]]
            self.used[slot] += self.sizes[unit]
        for net, pins in enumerate(self.problem.pins):
            here: dict[int, int] = {}
            for unit in pins:
                slot = self.slot_of[unit]
                here[slot] = here.get(slot, 0) + 1
            self.pins_on.append(here)
            if len(here) > 1:
                for slot in here:
                    self.load[slot] += self.fees[net][self.kind[slot]]

    @property
    def value(self) -> float:
        """The largest load."""
        return max(self.load)

    @property
    def legal(self) -> bool:
        """Whether every slot supports and holds its units."""
        return math.isfinite(self.value) and all(
            used <= limit for used, limit in zip(self.used, self.limits, strict=True)
        )

    def fits(self, unit: int, slot: int) -> bool:
        """Whether the unit can come to a slot: supported there, and within memory."""
        return (
            self.times[unit][self.kind[slot]] != math.inf
            and self.used[slot] + self.sizes[unit] <= self.limits[slot]
        )

    def after(self, unit: int, slot: int) -> tuple[float, float]:
        """Loads of the unit's slot and of another slot, were it moved there."""
        here = self.slot_of[unit]
        kind_here, kind_there = self.kind[here], self.kind[slot]
        left = self.load[here] - self.times[unit][kind_here]
        got = self.load[slot] + self.times[unit][kind_there]
        for net in self.problem.nets_of[unit]:
            on, fee = self.pins_on[net], self.fees[net]
            slots, there = len(on), on.get(slot, 0)
            stays = on[here] > 1
            if slots > 1:
                if not stays:
                    left -= fee[kind_here]
                    if slots == 2 and there:
                        got -= fee[kind_there]
                if not there:
                    got += fee[kind_there]
            else:
                # a net has at least two pins, so that others stay behind
                left += fee[kind_here]
                got += fee[kind_there]
        return left, got

    def move(self, unit: int, slot: int) -> None:
        """Move a unit to another slot."""
        here = self.slot_of[unit]
        self.load[here], self.load[slot] = self.after(unit, slot)
        self.used[here] -= self.sizes[unit]
        self.used[slot] += self.sizes[unit]
        for net in self.problem.nets_of[unit]:
            on = self.pins_on[net]
            on[here] -= 1
            if not on[here]:
                del on[here]
            on[slot] = on.get(slot, 0) + 1
        self.slot_of[unit] = slot
