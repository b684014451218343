"""Decides the mesh: how many devices share the batch (data), the layers (pipeline) and the tensors
(tensor); with it the layout of every tensor, the level of ZeRO and the number of microbatches.

For every way to write the number of devices as data x pipeline x tensor, layouts are chosen by
integer programming (`layouts/`), and the pipeline of one column is priced by dynamic programming
(`partition/`) for each number of microbatches, with the least ZeRO that fits. Two bounds say which
to look at first. One assumes perfect division,

    step >= (p + m - 1) / (p m) W / (d t)

with W the seconds of the whole batch on one device in such microbatches (`mesh_bounds.py` has it
for devices that differ). The other has the collectives too: with t and u the seconds of a
microbatch through all stages and of the end of the step under the layouts that are best for this
very sum,

    step >= (p + m - 1) / p t + u / p

A row takes no less time in a smaller microbatch, so that this bounds larger numbers of microbatches
on the same mesh as well. What has a bound that is no better than the best step found is not looked
at, and the certificate covers it by that bound.

Ranks follow the axes in the order pipeline, data, tensor or data, pipeline, tensor: tensor-parallel
ranks lie closest together, as they talk most (Narayanan et al., Megatron-LM, 2021).
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from ..compiler.ir.mesh import Mesh, MeshAxis
from ..compiler.ir.plan import DATA, PIPELINE, Alternative, Certificate, Plan
from ..compiler.ir.text import format_ranges
from ..compiler.sharding.sharding import Sharding
from ..compiler.sharding.unruled import unruled_warnings
from .candidates import Candidate, Pricing, Way
from .context import Context
from .mesh_bounds import Bounds, Entry
from .mesh_space import mesh_sizes, microbatch_counts, more_microbatches, search_space, ways_to_save
from .offload import may_offload, offloaded
from .partition.fitting import Fit
from .pinned import check_pinned, mesh_is_open
from .squeeze import squeeze

__all__ = ["ChooseMesh"]

_CLOSE = 1.25  # an estimate within this of the best may win when looked at closely
_FINALISTS = 4  # meshes, beside those of one axis
_ALTERNATIVES = 4
_STARVED = 3.0


@dataclass(frozen=True, slots=True)
class ChooseMesh:
    """Pass: fills `plan.mesh`, layouts, `plan.num_microbatches` and a first certificate."""

    name: str = "mesh"

    def run(self, plan: Plan, context: Context) -> Plan:
        check_pinned(plan.cluster, plan.mode, context.options)
        if not mesh_is_open(plan.cluster, context.options):
            return plan
        return _Search(plan, context).run()


class _Search:
    """Working state of the search."""

    def __init__(self, plan: Plan, context: Context) -> None:
        self.plan = plan
        self.context = context
        self.pricing = Pricing(plan, context)
        self.found: list[Candidate] = []
        self.looked_at: dict[int, Fit | None] = {}  # by place in `found`
        self.known = Bounds(self.pricing)
        self.bounds: list[float] = []  # of what was not priced
        self.tried: set[tuple[Mesh, int]] = set()  # with layouts to choose
        self.counts: set[int] = set()  # of microbatches, in what was searched
        self.pipelines: set[tuple[Mesh, int]] = set()  # tried, with none
        self.squeezed: set[tuple[Mesh, int, bool]] = set()
        self.offload = context.options.offload == "optimizer"

    def run(self) -> Plan:
        """Numbers of microbatches are few and typical, larger ones if nothing fits, or only what
        takes far longer; states are offloaded if that does not help."""
        while True:
            for counts_of in (microbatch_counts, more_microbatches):
                rows = self.pricing.layouts.rows
                self.search(search_space(self.plan, self.context, rows, counts_of))
                self.confirmed()
                self.squeeze()
                if self.confirmed() and not self.is_starved():
                    break
            if self.finalists():
                return self.finish()
            if self.offload or not may_offload(self.plan, self.context.options):
                return self.smallest()
            self.context.progress("nothing fits: offload optimizer states to the hosts")
            self.offload, self.bounds = True, []
            self.pricing.effort = 0

    def search(self, space: list[tuple[Mesh, int]]) -> None:
        """Price what may be better than the best so far.

        Bounds come in two kinds, by division and by layouts, which take longer: a bound by layouts
        is asked for where the one by division, raised as the others were, is the least.
        """
        known = self.known
        self.counts.update(count for _, count in space)
        far = [known.entry(known.by_division(*item), item) for item in space]
        near: list[Entry] = []
        heapq.heapify(far)
        while far or near:
            best = min((self.found[place].seconds for place in self.possible()), default=math.inf)
            if not near or (far and far[0].bound * known.raised < near[0].bound):
                entry = heapq.heappop(far)
                if entry.bound < best and entry.mesh not in known.close:
                    counts = (n for mesh, n in space if mesh == entry.mesh)
                    may_win = (n for n in counts if known.by_division(entry.mesh, n) < best)
                    known.by_layouts(entry.mesh, min(may_win, default=entry.count), best)
                bound = max(entry.bound, known.inferred(entry.mesh, entry.count))
                if bound < best:
                    bound = known.by_layouts(entry.mesh, entry.count, best)
                    heapq.heappush(near, known.entry(bound, entry.item, is_close=True))
                else:
                    self.bounds.append(bound)
                continue
            entry = heapq.heappop(near)
            if entry.bound >= best:
                self.bounds.append(entry.bound)
                continue
            has_layouts = any(axis.name != PIPELINE for axis in entry.mesh.axes)
            (self.tried if has_layouts else self.pipelines).add(entry.item)
            self.price(entry.mesh, entry.count, self.hopeful(entry.mesh, entry.count))
            if self.pricing.layouts.gathers_are_fast(*entry.item):
                ways = (way for way in self.ways(entry.mesh) if way.zero == 3)
                self.price_alike(entry.mesh, entry.count, ways)

    def hopeful(self, mesh: Mesh, count: int) -> Iterator[Way]:
        """The ways on `mesh`; where the first of those with the same layouts does not fit, and the
        last level does not either, without the others."""
        ways = self.ways(mesh)
        for _, alike in itertools.groupby(ways, key=lambda way: (way.recompute, way.saving)):
            first, *others = alike
            yield first
            fit = (self.pricing.candidate(mesh, count, way) for way in (first, *others[-1:]))
            if others and any(candidate is not None for candidate in fit):
                yield from others

    def ways(self, mesh: Mesh) -> tuple[Way, ...]:
        """Ways to save memory on `mesh`, least first."""
        return ways_to_save(self.plan, self.context, mesh, offload=self.offload)

    def price(self, mesh: Mesh, count: int, ways: Iterable[Way]) -> None:
        """Price plans on `mesh` with `count` microbatches: the first of `ways` that fits, and if
        that is without ZeRO the next as well, which may be faster, as ranks share the update.

        Where memory is so short that it takes more than that, so for each kind of recomputation.
        """
        for _, alike in itertools.groupby(ways, key=lambda way: way.recompute):
            before = len(self.found)
            self.price_alike(mesh, count, alike)
            if any(item.way.zero < 2 and not item.way.saving for item in self.found[before:]):
                return

    def price_alike(self, mesh: Mesh, count: int, ways: Iterable[Way]) -> None:
        fits = False
        for way in ways:
            if fits and not way.zero:
                return
            candidate = self.pricing.candidate(mesh, count, way)
            if candidate is not None:
                self.found.append(candidate)
                self.report(candidate)
            if fits or (candidate is not None and way.zero):
                return
            fits = candidate is not None

    def report(self, candidate: Candidate) -> None:
        plan, way = candidate.plan, candidate.way
        self.context.progress(
            f"mesh {plan.mesh}, {plan.num_microbatches} microbatches, ZeRO-{way.zero}, recompute "
            f"{way.recompute}: {candidate.seconds:.6g} s a step"
        )

    def confirmed(self) -> list[int]:
        """The finalists, all of which fit by liveness."""
        while pending := [place for place in self.finalists() if place not in self.looked_at]:
            for place in pending:
                candidate = self.found[place]
                self.looked_at[place] = self.pricing.fit(candidate.plan)
                if self.looked_at[place] is None:
                    mesh, count = candidate.plan.mesh, candidate.plan.num_microbatches
                    ways = self.ways(mesh)
                    self.price(mesh, count, ways[ways.index(candidate.way) + 1 :])
        return self.finalists()

    def is_starved(self) -> bool:
        """Whether something may be faster by far that did not fit."""
        best = min(map(self.seconds, self.finalists()))
        short = self.known.of_costly(self.short(), self.ways, best)
        return any(_STARVED * bound < best for bound in short)

    def squeeze(self) -> None:
        """Look for layouts that fit where the fastest do not, as long as they may win."""
        if not self.pricing.layouts.is_small:
            return
        self.squeeze_pipelines()
        short = sorted((self.known.by_layouts(*item), str(item), item) for item in self.costly())
        fits = self.meshes_that_fit([item for _, _, item in short])
        for bound, _, (mesh, count) in short:
            if bound >= self.best_seconds():
                return
            if mesh in fits and (mesh, count, self.offload) not in self.squeezed:
                self.squeezed.add((mesh, count, self.offload))
                self.squeeze_on(mesh, count)

    def squeeze_pipelines(self) -> None:
        """Look closely at stages that did not fit by the usual share of their additive bound."""
        possible = (self.found[place].plan for place in self.possible())
        fits = {(plan.mesh, plan.num_microbatches) for plan in possible}
        for mesh, count in sorted(self.pipelines - fits, key=str):
            if (mesh, count, self.offload) in self.squeezed:
                continue
            self.squeezed.add((mesh, count, self.offload))
            for way in self.ways(mesh):
                plan = self.pricing.plan_with(mesh, count, way, None)
                fit = self.pricing.fit(plan)
                if fit is not None and fit.solution.seconds < self.best_seconds():
                    self.looked_at[len(self.found)] = fit
                    self.found.append(Candidate(plan, way, fit.solution.seconds))
                    self.report(self.found[-1])

    def meshes_that_fit(self, short: Sequence[tuple[Mesh, int]]) -> set[Mesh]:
        """Meshes to squeeze: as long as nothing fits, where the leanest way does with the most
        microbatches, as fewer need no less memory."""
        meshes = dict.fromkeys(mesh for mesh, _ in short)
        if not math.isinf(self.best_seconds()):
            return set(meshes)
        fits = set()
        for mesh in meshes:
            most = max(count for other, count in short if other == mesh)
            leanest = next(way for way in reversed(self.ways(mesh)) if not way.saving)
            if self.squeeze_way(mesh, most, leanest, math.inf):
                fits.add(mesh)
        return fits

    def squeeze_on(self, mesh: Mesh, count: int) -> None:
        ways = [way for way in self.ways(mesh) if not way.saving]
        for _, alike in itertools.groupby(ways, key=lambda way: way.recompute):
            levels = tuple(alike)
            if self.pricing.short_bound(mesh, count, levels[-1]) >= self.best_seconds():
                continue
            for way in levels:
                self.squeeze_way(mesh, count, way, self.best_seconds())

    def squeeze_way(self, mesh: Mesh, count: int, way: Way, best: float) -> bool:
        """Whether a plan is found that fits and takes less than `best` seconds a step."""
        found = squeeze(self.pricing, mesh, count, way, best)
        if found is None:
            return False
        candidate, fit = found
        self.looked_at[len(self.found)] = fit
        self.found.append(candidate)
        self.report(candidate)
        return True

    def best_seconds(self) -> float:
        """Of what fits, or may fit."""
        return min((self.seconds(place) for place in self.possible()), default=math.inf)

    def short(self) -> set[tuple[Mesh, int]]:
        """What did not fit in the fastest layouts."""
        return self.tried - {
            (item.plan.mesh, item.plan.num_microbatches)
            for item in (self.found[place] for place in self.possible())
            if not item.way.saving
        }

    def costly(self) -> set[tuple[Mesh, int]]:
        """What fits in the fastest layouts at best if it shares more than the update or recomputes
        more than it has to."""
        return self.tried - {
            (item.plan.mesh, item.plan.num_microbatches)
            for item in (self.found[place] for place in self.possible())
            if not item.way.saving
            and item.way.zero < 2
            and item.way.recompute == self.ways(item.plan.mesh)[0].recompute
        }

    def finish(self) -> Plan:
        """The fastest of the finalists, of which there is one."""
        best = min(self.finalists(), key=self.preference)
        seconds = self.seconds(best)
        costly = self.costly()
        floor = min(
            seconds,
            *self.bounds,
            *self.known.of_layouts(self.tried - costly, seconds),
            *self.known.of_costly(costly, self.ways, seconds),
            *self.known.of_stages(self.pipelines, self.ways, seconds),
        )
        certificate = Certificate(
            objective=seconds,
            lower_bound=floor,
            gap=max(0.0, 1.0 - floor / seconds) if seconds else 0.0,
            search_space=self.told(),
            solver="",
            solver_seconds=0.0,
        )
        plan = replace(
            self.found[best].plan, certificate=certificate, alternatives=self.alternatives(best)
        )
        return self.warned(plan)

    def seconds(self, place: int) -> float:
        """Of a candidate, by the closest look that was taken at it."""
        fit = self.looked_at.get(place)
        return fit.solution.seconds if fit is not None else self.found[place].seconds

    def preference(self, place: int) -> tuple[float, int, int]:
        """Faster first; of equal ones, those that share no work among ranks that gains nothing."""
        inner = self.found[place].plan.stage_mesh.size
        return float(f"{self.seconds(place):.9e}"), inner, place

    def possible(self) -> list[int]:
        """Candidates that no closer look has ruled out."""
        return [i for i in range(len(self.found)) if self.looked_at.get(i, True) is not None]

    def finalists(self) -> list[int]:
        """Candidates to look at closely, or that have passed that: the best of each mesh, for the
        best meshes, and for those of one axis, which are what people write by hand."""
        rest = self.possible()
        rest.sort(key=lambda place: (self.seconds(place), place))
        first: dict[str, int] = {}
        for place in rest:
            first.setdefault(str(self.found[place].plan.mesh), place)
        chosen = list(first.values())
        limit = _CLOSE * self.seconds(chosen[0]) if chosen else 0.0
        return [
            place
            for rank, place in enumerate(chosen)
            if self.seconds(place) <= limit
            and (rank < _FINALISTS or len(self.found[place].plan.mesh.axes) == 1)
        ]

    def alternatives(self, best: int) -> tuple[Alternative, ...]:
        """The best of other meshes, fastest first; those that fit before those that do not."""
        entries = []
        for place, candidate in enumerate(self.found):
            plan = candidate.plan
            if plan.mesh != self.found[best].plan.mesh:
                entries.append(
                    Alternative(
                        mesh=plan.mesh,
                        num_microbatches=plan.num_microbatches,
                        zero=plan.zero_level,
                        step_seconds=self.seconds(place),
                        fits=self.looked_at.get(place, True) is not None,
                    )
                )
        entries.sort(key=lambda entry: (not entry.fits, entry.step_seconds, str(entry.mesh)))
        first: dict[str, Alternative] = {}
        for entry in entries:
            first.setdefault(str(entry.mesh), entry)
        return tuple(first.values())[:_ALTERNATIVES]

    def warned(self, plan: Plan) -> Plan:
        """With what the user should know: operators that could not be split, and a level of ZeRO
        that was asked for and has nothing to split."""
        warnings = unruled_warnings(self.context.graph, Sharding.of(plan, self.context.graph))
        level = self.context.options.zero
        if level and plan.zero_level != level:
            warnings += (
                f"ZeRO-{level} was asked for, the plan has ZeRO-{plan.zero_level}: no parameter "
                f"has a dim that could be split over the {DATA} axis",
            )
        return replace(plan, warnings=(*plan.warnings, *warnings))

    def told(self) -> str:
        """The space that the bounds cover."""
        pinned = self.context.options.mesh
        every, *fewer = mesh_sizes(self.plan.cluster)
        meshes = f"all data x pipeline x tensor meshes of {every} devices"
        if fewer:
            meshes += f" in their order, or of the first {format_ranges(tuple(sorted(fewer)))}"
        if len({entry.backend for entry in self.plan.cluster.types}) > 1:
            meshes += ", of one backend in each stage"
        numbers = ", ".join(map(str, sorted(self.counts)))
        return (
            f"{meshes if pinned is None else f'mesh {pinned}'}; layouts in which equal layers are "
            "alike, over the data axis as that decides alone; ZeRO 0 to 3, which gathers "
            "parameters on use; recomputation; "
            f"microbatches: {numbers}"
            + ("; all optimizer states offloaded" if self.offload else "")
        )

    def smallest(self) -> Plan:
        """Nothing fits: what needs least, so that the error of the next pass is about that."""
        count = len(self.plan.cluster.devices)
        mesh = self.context.options.mesh or Mesh((MeshAxis(PIPELINE, count),))
        counts = microbatch_counts(self.plan, self.context, mesh.axis(PIPELINE).size)
        if all(axis.name == PIPELINE for axis in mesh.axes):
            whole = replace(self.plan, num_microbatches=counts[-1])
            return offloaded(whole, self.context.graph) if self.offload else whole
        least = self.ways(mesh)[-1]
        plan = self.pricing.plan_on(mesh, counts[-1], least)
        plan = plan or self.pricing.plan_on(mesh, counts[-1], replace(least, saving=0.0))
        assert plan is not None, "without a limit of memory there are layouts"
        return plan
