"""Decides whether stages have meshes of their own, where devices are so uneven that it may pay.

The best plan over one mesh is known, and its stages. What no stages take less than, on any meshes
of their own, is all work on all devices,

    step >= W / (c_1 + ... + c_n)

with c the work that a device does in a second; where that is no better, nothing is tried. Of the
meshes of `unlike_space.py`, those are priced by run of units (`stage_meshes.py`) whose own bound by
division is better than the best plan, first with about four microbatches a stage, and what comes
close with other numbers. What is still better than the best plan is planned.

The certificate covers what was priced, and says what is known of the rest.
"""

from __future__ import annotations

import contextlib
import math
import time
from dataclasses import dataclass, replace

from ..compiler.ir.counts import divisors
from ..compiler.ir.errors import InfeasibleError
from ..compiler.ir.mesh import Mesh, format_stage_meshes
from ..compiler.ir.plan import DATA, Alternative, Plan, StageMesh
from .candidates import Pricing
from .context import Context, PlanOptions
from .mesh_bounds import Bounds
from .mesh_space import is_uneven
from .own_stages import OwnStages
from .pinned import mesh_is_open
from .stage_meshes import StageMeshSearch, stage_groups
from .unlike_space import unlike_meshes

__all__ = ["TryStageMeshes"]

_Meshes = tuple[Mesh, ...]

_A_STAGE = 4  # microbatches, with which meshes are priced first
_CLOSE = 1.25  # a step within this of the best may be the best with other microbatches
_LEADING = 4  # meshes that are priced with others
_MOST_PRICED = 150  # meshes
_MOST_PLANNED = 12  # which may not fit
_ALTERNATIVES = 4


@dataclass(frozen=True, slots=True)
class TryStageMeshes:
    """Pass: may replace the stages of the plan over one mesh, its layouts and its certificate."""

    name: str = "unlike_meshes"

    def run(self, plan: Plan, context: Context) -> Plan:
        may_pay = is_uneven(plan.cluster) and not plan.is_offloaded
        if not may_pay or not _is_open(plan, context.options):
            return plan
        return _Trial(plan, context).run()


def _is_open(plan: Plan, options: PlanOptions) -> bool:
    """Whether nothing is asked for that is refused beside stages with meshes of their own."""
    given = options.mesh is not None or options.one_mesh or options.layout_pins
    is_open = mesh_is_open(plan.cluster, options) and not given
    return bool(is_open and options.offload != "optimizer" and len(plan.cluster.devices) > 2)


class _Trial:
    """Working state of the pass."""

    def __init__(self, plan: Plan, context: Context) -> None:
        self.plan = self.best = plan
        self.context = context
        self.began = time.perf_counter()
        start = replace(plan.over(StageMesh(Mesh(()))), stages=(), recomputed=(), warnings=())
        self.start = replace(start, num_microbatches=0)
        self.known = OwnStages(self.start, context)
        self.pricing = Pricing(self.start, context)
        self.bounds = Bounds(self.pricing)
        self.searches: dict[_Meshes, StageMeshSearch] = {}
        self.priced: dict[tuple[_Meshes, int], tuple[float, float]] = {}

    def run(self) -> Plan:
        least = self.least()
        if least >= self.limit:
            return self.told(
                least, f"no stages on meshes of their own take less than {least:.6g} s"
            )
        found = list(unlike_meshes(self.plan.cluster, self.plan.batch_size))
        self.price(found)
        pairs = sorted(self.priced, key=lambda pair: (self.priced[pair][0], str(pair)))
        for meshes, count in pairs[:_MOST_PLANNED]:
            if self.priced[meshes, count][0] < self.limit:
                with contextlib.suppress(InfeasibleError):
                    made = self.search(meshes).run((count,))
                    if made.objective_seconds < self.limit:
                        self.best = made
        return self.told(*self.covered(least))

    @property
    def limit(self) -> float:
        """What has to be less to be better than the best plan."""
        return self.best.objective_seconds * (1.0 - self.context.options.tolerance)

    def least(self) -> float:
        """No plan takes less, whatever its stages: all work divided perfectly."""
        rows = self.plan.batch_size
        counts = (1,) if self.pricing.layouts.gains_with_size else divisors(rows)
        devices = [(device.index,) for device in self.plan.cluster.devices]
        return min(
            self.pricing.work_seconds(count) / sum(self.pricing.rate(d, count) for d in devices)
            for count in counts
        )

    def search(self, meshes: _Meshes) -> StageMeshSearch:
        if meshes not in self.searches:
            self.searches[meshes] = StageMeshSearch(self.start, self.known, meshes)
        return self.searches[meshes]

    def price(self, found: list[_Meshes]) -> None:
        """Of all meshes that may win with about four microbatches a stage, then of those that come
        close with other numbers; in small graphs of all with all numbers."""
        promising = []
        for meshes in found:
            counts = self.hopeful(meshes)
            if counts:
                middle = min(counts, key=lambda n: abs(math.log(n / (_A_STAGE * len(meshes)))))
                bound = self.bounds.divided(stage_groups(meshes), middle, len(meshes))
                promising.append((bound, format_stage_meshes(meshes), meshes, middle))
        first = []
        for bound, name, meshes, count in sorted(promising)[:_MOST_PRICED]:
            if bound < self.limit:
                first.append((self.price_with(meshes, count), name, meshes))
        first.sort()
        is_small = self.pricing.layouts.is_small
        for number, (seconds, _, meshes) in enumerate(first):
            if is_small or (number < _LEADING and seconds < _CLOSE * self.limit):
                for count in self.hopeful(meshes):
                    self.price_with(meshes, count)

    def hopeful(self, meshes: _Meshes) -> list[int]:
        """Numbers of microbatches with which `meshes` may be better than the best plan."""
        groups = stage_groups(meshes)
        counts = self.search(meshes).counts()
        rows = self.plan.batch_size
        data = [mesh.axis(DATA).size for mesh in meshes]
        legal = (n for n in counts if all(rows // n % size == 0 for size in data))
        return [n for n in legal if self.bounds.divided(groups, n, len(meshes)) < self.limit]

    def price_with(self, meshes: _Meshes, count: int) -> float:
        if (meshes, count) not in self.priced:
            quick = self.search(meshes).quick(count)
            self.priced[meshes, count] = quick or (math.inf, math.inf)
        return self.priced[meshes, count][0]

    def covered(self, least: float) -> tuple[float, str]:
        """What nothing that was priced is below, and what that was."""
        tried = list(dict.fromkeys(meshes for meshes, _ in self.priced))
        counts = sorted({count for _, count in self.priced})
        bound = min((bound for _, bound in self.priced.values()), default=math.inf)
        rest = f"others take at least {least:.6g} s"
        if not tried:
            return bound, f"stages on meshes of their own take at least {least:.6g} s"
        return bound, (
            f"{len(self.priced)} pairs of meshes of the stages' own, such as "
            f"{format_stage_meshes(tried[0])}, and {', '.join(map(str, counts))} microbatches, "
            "each in runs of units in one order and in the layouts that are fastest for the whole "
            f"model on each mesh; {rest}"
        )

    def told(self, bound: float, what: str) -> Plan:
        """The best plan, with what its certificate covers."""
        before, own = self.plan.certificate, self.best.certificate
        assert before is not None and own is not None
        floor = min(before.lower_bound, bound, own.objective)
        certificate = replace(
            before,
            objective=own.objective,
            lower_bound=floor,
            gap=max(0.0, 1.0 - floor / own.objective) if own.objective else 0.0,
            search_space=f"{before.search_space}; {what}",
            solver_seconds=before.solver_seconds + time.perf_counter() - self.began,
        )
        alternatives = self.plan.alternatives
        if self.best is not self.plan:
            uniform = Alternative(
                mesh=self.plan.mesh,
                num_microbatches=self.plan.num_microbatches,
                zero=self.plan.zero_level,
                step_seconds=self.plan.objective_seconds,
                fits=True,
            )
            alternatives = (uniform, *alternatives[: _ALTERNATIVES - 1])
        return replace(self.best, certificate=certificate, alternatives=alternatives)
