"""What no plan on a mesh with so many microbatches is faster than, and what to look at first.

The two bounds are those of `mesh.py`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field

from ..compiler.ir.mesh import Mesh
from ..compiler.ir.plan import PIPELINE
from .candidates import Pricing, Way
from .columns import stage_devices

__all__ = ["Bounds", "Entry"]

Item = tuple[Mesh, int]
Ways = Callable[[Mesh], tuple[Way, ...]]

_PROVEN = 4
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
        self._devices: dict[Mesh, tuple[tuple[int, ...], ...]] = {}
        self.close: dict[Mesh, dict[int, float]] = {}  # bounds by layouts, by microbatches
        self._could_rise: set[tuple[Mesh, int]] = set()  # those that were enough as they are
        self.raised = math.inf  # least share of a bound by layouts to that by division

    def by_division(self, mesh: Mesh, count: int) -> float:
        """No plan on `mesh` with `count` microbatches is faster, whatever its collectives."""
        return self.divided(self._groups(mesh), count, mesh.axis(PIPELINE).size)

    def divided(self, groups: Iterable[tuple[int, ...]], count: int, most: int) -> float:
        """No plan is faster that has at most so many stages, each on the devices of one of
        `groups`, and `count` microbatches.

        With c_1 >= c_2 >= ... the work that the groups do in a second, stages take no less than
        the bottleneck allows if the fastest are filled first, and no bottleneck is better than
        one that just fills some: step >= min_k (k + m - 1) / m W / (c_1 + ... + c_k).
        """
        rates = sorted((self._pricing.rate(group, count) for group in groups), reverse=True)[:most]
        sums = list(enumerate(itertools.accumulate(rates), 1))
        if rates[0] == rates[-1]:  # all are filled
            sums = sums[-1:]
        work = self._pricing.work_seconds(count)
        return min((stages + count - 1) / count * work / rate for stages, rate in sums)

    def _groups(self, mesh: Mesh) -> tuple[tuple[int, ...], ...]:
        """Devices of each stage, or that may have one."""
        if mesh not in self._devices:
            single = all(axis.name == PIPELINE for axis in mesh.axes)
            every = range(len(self._pricing.plan.cluster.devices))
            groups = tuple((device,) for device in every) if single else stage_devices(mesh)
            self._devices[mesh] = groups
        return self._devices[mesh]

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

    # -- of what was priced ------------------------------------------------------------------------

    def of_layouts(self, items: Collection[Item], best: float) -> Iterator[float]:
        """Bounds of `items`, however they are cut into stages, that are as high as they can be
        where they are below the `best` step."""
        return (self.by_layouts(*item, best) for item in sorted(items, key=str))

    def of_costly(self, items: Collection[Item], ways: Ways, best: float) -> Iterator[float]:
        """Of `items` which did not fit in the fastest layouts, or took recomputation to: others may
        fit that were not found. Where the bound is below the `best` step, the memory is counted in.

        Args:
            ways: to save memory on a mesh, least first.
        """
        for mesh, count in sorted(items, key=str):
            bound = self.by_layouts(mesh, count)
            if bound < best:
                leanest = {way.recompute: way for way in ways(mesh)}
                of_ways = (self._pricing.short_bound(mesh, count, w) for w in leanest.values())
                bound = max(bound, min(of_ways))
            yield bound

    def of_stages(self, items: Collection[Item], ways: Ways, best: float) -> Iterator[float]:
        """Of pipelines of single devices; where the bound of the dynamic program is below the
        `best` step, the integer program is asked as well, for the few where it is lowest."""
        of_stages = self._pricing.pipeline_bound
        bounds = [(of_stages(*item, ways(item[0])), item) for item in items]
        bounds.sort(key=lambda entry: (entry[0], str(entry[1])))
        for number, (bound, item) in enumerate(bounds):
            if bound < best and number < _PROVEN:
                bound = max(bound, of_stages(*item, ways(item[0]), closely=True))
            yield bound
