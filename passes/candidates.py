"""Plans on one mesh: their layouts, and what the pipeline of a column of them costs and needs.

A candidate is estimated by dynamic programming over the units of the captured graph; the few that
may win are looked at as closely as the pass that decides the stages will.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from ..compiler.ir.cluster import DeviceType
from ..compiler.ir.graph import ValueKind
from ..compiler.ir.mesh import Mesh
from ..compiler.ir.plan import DATA, PIPELINE, Plan
from ..compiler.sharding.sharding import make_sharding
from ..compiler.sharding.zero import zero_layouts
from ..cost_models.corrections import least
from ..cost_models.ops import price
from ..cost_models.slowest import slowest_type
from .columns import Column, column_of, layouts_key, parameters_of
from .context import Context
from .layouts.choose import LayoutChoice, Memory
from .offload import offloaded
from .partition.devices import used_types
from .partition.fitting import Fit, Needs, find_fitting, with_memory
from .partition.from_graph import state_problem
from .partition.prepare import stage_counts, state
from .partition.problem import StageProblem
from .partition.search import SearchLimits, Solution, Tables, estimate, search
from .partition.statement import Statement
from .recompute import choose_recompute
from .stage_layouts import StageLayouts

__all__ = ["Candidate", "Pricing", "Way"]

_TYPICAL = 1.1  # the additive bound of memory, as a share of the need
_GENEROUS = 1.25  # such shares above which no stages are searched
_FAR_ABOVE = 2.0  # such shares above which a stage surely does not fit
_AMPLE = 1e3
_FAR = 1.25  # share of the memory that additive bounds exceed it by, if nothing is to fit
_LOOK_SECONDS = 1.0  # deterministic time for the integer programs of one candidate


@dataclass(frozen=True, slots=True)
class Way:
    """How memory is saved: level of ZeRO, in what share of it layouts have to fit by their additive
    bound (0: no limit), and what is recomputed and offloaded (see `PlanOptions`)."""

    zero: int
    saving: float
    recompute: str
    offload: bool = False


@dataclass(frozen=True, slots=True)
class Candidate:
    """A priced plan without stages."""

    plan: Plan
    way: Way
    seconds: float


class Pricing:
    """Prices plans for one graph and cluster; layouts and columns are made once."""

    def __init__(self, plan: Plan, context: Context) -> None:
        self.plan = plan
        self.context = context
        self.layouts = StageLayouts(plan, context)
        self._work: dict[int, float] = {}
        self._paces: dict[tuple[str, int], float] = {}
        self._candidates: dict[tuple[Mesh, int, Way], Candidate | None] = {}
        self._unfit: dict[tuple[Mesh, Way], int] = {}  # with so many microbatches or fewer
        self._choices: dict[object, LayoutChoice | None] = {}  # with saving
        self.effort = 0  # of walks through layouts for little memory (`squeeze.py`)
        self._short: dict[
            tuple[Mesh, float, bool, float], int
        ] = {}  # likewise, of memory for layouts
        self._columns: dict[object, Column] = {}
        self._recompute: dict[str, tuple[int, ...]] = {}
        self._statements: dict[object, Statement] = {}

    def work_seconds(self, count: int) -> float:
        """Of the whole batch in `count` microbatches on one device, launches not counted."""
        if count not in self._work:
            self._work[count] = count * sum(self._least_costs(count))
        return self._work[count]

    def candidate(self, mesh: Mesh, count: int, way: Way) -> Candidate | None:
        """The plan on `mesh` with `count` microbatches, estimated; None if it does not fit."""
        key = (mesh, count, way)
        if count <= self._unfit.get((mesh, way), 0):  # fewer never need less memory
            return None
        if key not in self._candidates:
            self._candidates[key] = self._estimated(mesh, count, way)
            if self._candidates[key] is None:
                self._unfit[mesh, way] = count
        return self._candidates[key]

    def _estimated(self, mesh: Mesh, count: int, way: Way) -> Candidate | None:
        found = self._priced(self.plan_on(mesh, count, way), way)
        if not self.layouts.sums_are_late(mesh, count):
            return found
        # layouts that sum less may be faster
        plan = self.plan_on(mesh, count, way, late=1.0)
        if found is not None and plan == found.plan:  # best by both forms, so by the larger
            return found
        table = [found, self._priced(plan, way, late=1.0)]
        if (late := self.layouts.between(mesh, count)) is not None:
            table.append(self._priced(self.plan_on(mesh, count, way, late=late), way, late=late))
        priced = (item for item in table if item is not None)
        return min(priced, key=lambda item: item.seconds, default=None)

    def _priced(self, plan: Plan | None, way: Way, *, late: float = 0.0) -> Candidate | None:
        """`plan` has layouts for sums of gradients that are so `late`, see `StageLayouts`."""
        if plan is None:
            return None
        if plan.stage_mesh.axes:
            choice = self._choice(plan.mesh, plan.num_microbatches, way, late=late)
            assert choice is not None
            if self._is_far_too_large(plan, way, choice):
                return None
        statement, counts = self._pipeline(plan)
        if statement is None or self._is_too_large(plan, statement):
            return None
        problem = state_problem(statement, plan.num_microbatches)
        limits = SearchLimits(tolerance=self.context.options.tolerance, num_orders=1)
        solution = estimate(with_memory(problem, _TYPICAL), counts, limits)
        if math.isinf(solution.seconds) and counts == (1,):
            solution = self._whole(statement, problem, limits)
        if math.isinf(solution.seconds):
            return None
        return Candidate(plan, way, solution.seconds)

    def _whole(self, statement: Statement, problem: StageProblem, limits: SearchLimits) -> Solution:
        """One stage that exceeds the usual share of the additive bound: whether it fits is soon
        known, as there is only one."""
        solution = estimate(with_memory(problem, _FAR_ABOVE), (1,), limits)
        found = solution.assignment
        if found is None or Needs.of(statement, problem).fitting_share(found) is None:
            return solution
        return Solution(None, math.inf, solution.lower_bound, solution.methods)

    def fit(self, plan: Plan) -> Fit | None:
        """The fastest stages of `plan` that fit by liveness, over units made for its microbatches;
        None if none are found."""
        statement, counts = self._pipeline(plan, closely=True)
        if statement is None:
            return None
        problem = state_problem(statement, plan.num_microbatches)
        limits = self._limits()
        tables = Tables.of(problem, limits)
        return find_fitting(
            statement, problem, counts, lambda other: search(other, counts, limits, tables)
        )

    def pipeline_bound(
        self, mesh: Mesh, count: int, ways: Iterable[Way], *, closely: bool = False
    ) -> float:
        """No stages on `mesh`, one device each, of the units of the captured graph take less in any
        of `ways`, which recompute more and more; infinite if the additive bound of memory of all of
        them exceeds what is searched.

        Args:
            closely: by the integer program as well.
        """
        least = math.inf
        for way in ways:
            plan = self.plan_with(mesh, count, way, None)
            statement, counts = self._pipeline(plan)
            if statement is None:
                break
            problem, limits = state_problem(statement, count), self._limits()
            tables, solve = Tables.of(problem, limits), search if closely else estimate
            free, within = (
                solve(with_memory(problem, share), counts, limits, tables).lower_bound
                for share in (_AMPLE, _GENEROUS)
            )
            least = min(least, within)
            if free >= within:  # memory does not bind, so that recomputing only adds
                break
        return least

    def _limits(self) -> SearchLimits:
        options = self.context.options
        limit = min(_LOOK_SECONDS, options.time_limit_seconds)
        return SearchLimits(tolerance=options.tolerance, time_limit=limit, seed=options.seed)

    def short_bound(self, mesh: Mesh, count: int, way: Way) -> float:
        """No plan on `mesh` with `count` microbatches is faster that recomputes and offloads as
        `way` says, saves no more by ZeRO and fits; infinite if none fits.

        Every stage holds what it trains, and a microbatch's saved tensors if it recomputes nothing.
        What recomputing takes is not counted: collectives keep their results, and so a rank may
        compute nothing again of what the whole graph would (`compiler/sharding/recompute.py`).
        """
        layouts = self.layouts
        in_flight = 0.0 if self.recomputed(way.recompute) else layouts.portion(count)
        memory = self.memory(mesh, count, way, 1.0, bounding=True)
        memory = replace(memory, in_flight=in_flight)
        return layouts.lower_bound(mesh, count, memory)

    def _least_costs(self, count: int) -> list[float]:
        """Seconds of each node, of one of `count` microbatches on one device at its best, whichever
        type is fastest; no part of it is priced less anywhere, even where prices were measured."""
        tables = [self._costs_at_best(kind, count) for kind in used_types(self.plan.cluster)]
        return [min(row) for row in zip(*tables, strict=True)]

    def _costs_at_best(self, kind: DeviceType, count: int) -> list[float]:
        kind = kind.at_its_best()
        if kind.corrections is not None:
            kind = replace(kind, corrections=least(kind.corrections))
        portion = self.layouts.portion(count)
        costs = price(self.context.graph, kind, batch_fraction=portion)
        return [cost.total_seconds for cost in costs]

    def rate(self, devices: tuple[int, ...], count: int) -> float:
        """How many devices of the types that are fastest, node by node, do no less than `devices`
        that share the work of each node, of one of `count` microbatches."""
        cluster = self.plan.cluster
        if len(used_types(cluster)) == 1:
            return float(len(devices))
        kind = slowest_type(cluster, devices)
        key = kind.name, count
        if key not in self._paces:
            own, least = self._costs_at_best(kind, count), self._least_costs(count)
            pairs = zip(own, least, strict=True)
            ratios = (a / b for a, b in pairs if 0.0 < b < math.inf)
            self._paces[key] = min(ratios, default=1.0)
        return len(devices) / self._paces[key] if self._paces[key] else math.inf

    # -- layouts -----------------------------------------------------------------------------------

    def plan_on(self, mesh: Mesh, count: int, way: Way, *, late: float = 0.0) -> Plan | None:
        """The plan before its stages, layouts in the order of the mesh's own axes; None if no
        layouts fit.

        Args:
            late: see `StageLayouts.fastest`.
        """
        choice = None
        if any(axis.name != PIPELINE for axis in mesh.axes):
            choice = self._choice(mesh, count, way, late=late)
            if choice is None:
                return None
        return self.plan_with(mesh, count, way, choice)

    def _choice(
        self, mesh: Mesh, count: int, way: Way, *, late: float = 0.0
    ) -> LayoutChoice | None:
        """Layouts on `mesh`: with `saving`, those that fit a share of the memory, whatever ZeRO and
        recomputation save beside."""
        if not way.saving:
            return self.layouts.fastest(mesh, count, late=late)
        key = (mesh, count, way.saving, way.offload, late)
        if count <= self._short.get((mesh, way.saving, way.offload, late), 0):
            return None  # fewer microbatches never need less memory
        if key not in self._choices:
            like = Way(0, way.saving, "none", way.offload)
            memory = self.memory(mesh, count, like, way.saving)
            self._choices[key] = self.layouts.choice_within(mesh, count, memory, late=late)
            if self._choices[key] is None:
                self._short[mesh, way.saving, way.offload, late] = count
        return self._choices[key]

    def memory(
        self, mesh: Mesh, count: int, way: Way, share: float | None, *, bounding: bool = False
    ) -> Memory:
        """A `share` of that of one device of each stage, all that layouts want if it is None, with
        bytes counted as ZeRO and offloading save them; recomputation is not counted."""
        limit = None if share is None else math.floor(share * self.layouts.memory_bytes)
        return self.layouts.memory(
            mesh, count, limit, zero=way.zero, offload=way.offload, bounding=bounding
        )

    def plan_with(self, mesh: Mesh, count: int, way: Way, choice: LayoutChoice | None) -> Plan:
        """The plan before its stages with layouts `choice`, which is None on a mesh that needs
        none."""
        recomputed = self.recomputed(way.recompute)
        plan = replace(self.plan, mesh=mesh, num_microbatches=count, recomputed=recomputed)
        if choice is not None:
            parameters = choice.parameter_layouts
            if way.zero:
                sharding = make_sharding(
                    self.context.graph, choice.mesh, choice.node_layouts, choice.layouts, parameters
                )
                parameters = zero_layouts(self.context.graph, sharding, DATA, way.zero)
            plan = replace(
                plan,
                node_layouts=choice.node_layouts,
                layouts=choice.layouts,
                parameter_layouts=parameters,
            )
        return offloaded(plan, self.context.graph) if way.offload else plan

    def recomputed(self, how: str) -> tuple[int, ...]:
        if how not in self._recompute:
            self._recompute[how] = choose_recompute(self.context.graph, how)
        return self._recompute[how]

    # -- the pipeline of a column ------------------------------------------------------------------

    def _pipeline(
        self, plan: Plan, *, closely: bool = False
    ) -> tuple[Statement | None, tuple[int, ...]]:
        """The pipeline of one column; none if the model has fewer parts than stages.

        Plans that differ in microbatches only have the same, unless it is made `closely`; and if
        they hold the same parts of parameters, the same but for what gradients and states take.
        """
        key = (str(plan.mesh), layouts_key(plan), plan.recomputed)
        if key not in self._columns:
            self._columns[key] = column_of(plan, self.context)
        column = self._columns[key]
        count = plan.num_microbatches if closely else 0
        if (key, count) not in self._statements:
            local = replace(column.plan, num_microbatches=count)
            self._statements[key, count] = state(local, column.context)
        statement = self._statements[key, count]
        is_open = self.context.options.mesh is None and not plan.stage_mesh.axes
        if not is_open and len(statement.units) < plan.mesh.axis(PIPELINE).size:
            return None, ()
        parameters = parameters_of(plan, self.context.graph, column)
        counts = stage_counts(column.plan, column.context, len(statement.units))
        return replace(statement, parameters=parameters), counts

    def _is_far_too_large(self, plan: Plan, way: Way, choice: LayoutChoice) -> bool:
        """Whether one stage that keeps all that backward reads exceeds its memory by far, by the
        bytes that its layouts were chosen with: no need to make its column."""
        is_pipeline = len(plan.mesh.axes) > len(plan.stage_mesh.axes)
        if is_pipeline or way.recompute != "none" or way.zero or way.offload:
            return False
        saved = self.layouts.portion(plan.num_microbatches) * choice.saved_bytes
        return choice.static_bytes + saved > _FAR * self.layouts.memory_bytes

    def _is_too_large(self, plan: Plan, statement: Statement) -> bool:
        """Whether parameters, gradients and states alone exceed the memory of all stages."""
        held = sum(value.type.num_bytes for value in statement.graph.values_of(ValueKind.PARAMETER))
        held += sum(e.gradient_bytes + e.state_bytes for e in statement.parameters.values())
        stages = plan.mesh.axis(PIPELINE).size
        host = self.plan.cluster.type_of(0).host
        away = sum(e.host_bytes for e in statement.parameters.values())
        if host is not None and away > stages * host.memory_bytes:
            return True
        return held > stages * self.layouts.memory_bytes
