"""Layouts for little memory: the fastest first, then leaner ones, until the plan fits by liveness.

The additive bound under which layouts are solved differs from what a plan needs in the end. So it
serves to order them: each is the fastest of those whose bound is below that of the one before, and
the first that truly fits ends the walk, as those after it are slower. What is faster and fits all
the same has a larger bound, so in a small graph such are looked through next, fastest first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from ..compiler.ir.mesh import Mesh
from .candidates import Candidate, Pricing, Way
from .layouts.choose import LayoutChoice, Memory
from .partition.fitting import Fit

__all__ = ["squeeze"]

_RUNGS = 40
_OTHERS = 6
_EFFORT = 60_000  # of all walks of a search, which is seconds: then what was found has to do
_LESS = 1.0 - 1e-4  # what solvers take for less


def squeeze(
    pricing: Pricing, mesh: Mesh, count: int, way: Way, best: float
) -> tuple[Candidate, Fit] | None:
    """The fastest plan found on `mesh` with `count` microbatches that fits, with its stages; None
    if none is found that could take less than `best` seconds a step.

    Args:
        way: without `saving`.
    """
    return _Walk(pricing, mesh, count, way, best).run()


class _Walk:
    def __init__(self, pricing: Pricing, mesh: Mesh, count: int, way: Way, best: float) -> None:
        self.pricing = pricing
        self.mesh, self.count, self.way = mesh, count, way
        self.best = best
        self.unfit: list[LayoutChoice] = []
        self.found: tuple[Candidate, Fit] | None = None

    def run(self) -> tuple[Candidate, Fit] | None:
        memory = self.pricing.memory(self.mesh, self.count, self.way, None)
        for lean in self.leaner(memory):
            if self.fits(lean):
                break
        for _ in range(_OTHERS):
            seeks = self.unfit and not math.isinf(self.best) and not self.is_spent()
            choice = self.choice(memory) if seeks else None
            if choice is None or self.fits(choice):
                break
        return self.found

    def leaner(self, memory: Memory) -> Iterator[LayoutChoice]:
        """One after the other, while they may win."""
        for rung in range(_RUNGS):
            is_first = rung == 0 and math.isinf(self.best)  # as long as nothing fits
            if self.is_spent() and not is_first:
                return
            choice = self.within(memory)
            if choice is None or self.seconds(choice) >= self.best:
                return
            yield choice
            saved = memory.in_flight * choice.saved_bytes
            need = choice.static_bytes + saved + choice.transient_bytes
            memory = replace(memory, limit_bytes=math.floor(_LESS * need))

    def choice(self, memory: Memory) -> LayoutChoice | None:
        """The fastest that was not looked at, if it may win."""
        choice = self.within(memory, self.unfit)
        return None if choice is None or self.seconds(choice) >= self.best else choice

    def within(self, memory: Memory, others: Sequence[LayoutChoice] = ()) -> LayoutChoice | None:
        layouts = self.pricing.layouts
        self.pricing.effort += layouts.effort(self.mesh, self.count)
        return layouts.choice_within(self.mesh, self.count, memory, others)

    def is_spent(self) -> bool:
        return self.pricing.effort > _EFFORT

    def seconds(self, choice: LayoutChoice) -> float:
        return self.pricing.layouts.least_seconds(self.mesh, self.count, choice)

    def fits(self, choice: LayoutChoice) -> bool:
        plan = self.pricing.plan_with(self.mesh, self.count, self.way, choice)
        fit = self.pricing.fit(plan)
        if fit is None:
            self.unfit.append(choice)
            return False
        seconds = fit.solution.seconds
        if seconds < self.best:
            way = replace(self.way, saving=1.0) if self.unfit else self.way
            self.found = Candidate(plan, way, seconds), fit
            self.best = seconds
        return True
