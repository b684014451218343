"""What no plan on a mesh with so many microbatches is faster than, and what to look at first.

The two bounds are those of `mesh.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from ..compiler.ir.mesh import Mesh
from ..compiler.ir.plan import DATA, PIPELINE, TENSOR
from .candidates import Pricing

__all__ = ["Bounds", "Entry"]

_NO_TIME = 1e-30  # seconds, of a graph that computes nothing
_STEPS_OF_BOUND = 20  # bounds are about equal if they are within a twentieth


@dataclass(frozen=True, slots=True, order=True)
class Entry:
    """Something to price, by what comes first."""

    order: tuple[float, int, str]
    bound: float = field(compare=False)
    item: tuple[Mesh, int] = field(compare=False)

    @property
    def mesh(self) -> Mesh:
        return self.item[0]

    @property
    def count(self) -> int:
        return self.item[1]


class Bounds:
    """Bounds for one graph and cluster, each found once."""

    def __init__(self, pricing: Pricing) -> None:
        self._pricing = pricing
        self.close: dict[Mesh, dict[int, float]] = {}  # bounds by layouts, by microbatches
        self._could_rise: set[tuple[Mesh, int]] = set()  # those that were enough as they are
        self.raised = math.inf  # least share of a bound by layouts to that by division

    def by_division(self, mesh: Mesh, count: int) -> float:
        """No plan on `mesh` with `count` microbatches is faster, whatever its collectives."""
        stages = mesh.axis(PIPELINE).size
        inner = mesh.axis(DATA).size * mesh.axis(TENSOR).size
        return (stages + count - 1) / (stages * count) * self._pricing.work_seconds(count) / inner

    def entry(self, bound: float, item: tuple[Mesh, int], *, is_close: bool = False) -> Entry:
        """Least bound first; of about equal ones by division fewer microbatches, whose bounds say
        something about more, and of about equal ones by layouts more, which need less memory."""
        mesh, count = item
        about = _STEPS_OF_BOUND * math.log(bound or _NO_TIME)
        about = round(about) if about < math.inf else about
        return Entry((about, -count if is_close else count, str(mesh)), bound, item)

    def by_layouts(self, mesh: Mesh, count: int, enough: float = math.inf) -> float:
        """No plan is faster, whatever its layouts; a bound of at least `enough` need not be as high
        as it can be."""
        found = self.close.setdefault(mesh, {})
        if count in found and (found[count] >= enough or (mesh, count) not in self._could_rise):
            return found[count]
        divided = self.by_division(mesh, count)
        laid_out = self._pricing.layouts.lower_bound(mesh, count, enough=enough)
        bound = found[count] = max(divided, laid_out)
        if enough <= bound:
            self._could_rise.add((mesh, count))
        else:
            self._could_rise.discard((mesh, count))
        if divided and bound < math.inf:
            self.raised = min(self.raised, bound / divided)
        return bound

    def inferred(self, mesh: Mesh, count: int) -> float:
        """A bound from those by layouts of the same mesh with fewer microbatches, where a row takes
        no less time in a smaller one: only fill and drain weigh less. Elsewhere there is none."""
        gains = self._pricing.layouts.gains_with_size
        stages = mesh.axis(PIPELINE).size
        return max(
            (
                bound * (stages + count - 1) * fewer / ((stages + fewer - 1) * count)
                for fewer, bound in self.close.get(mesh, {}).items()
                if fewer == count or (gains and fewer < count)
            ),
            default=0.0,
        )
