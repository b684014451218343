"""Plans on one mesh: their layouts, and what the pipeline of a column of them costs and needs.

A candidate is estimated by dynamic programming over the units of the captured graph; the few that
may win are looked at as closely as the pass that decides the stages will.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

from ..compiler.ir.errors import InfeasibleError
from ..compiler.ir.graph import Mode, ValueKind
from ..compiler.ir.mesh import Mesh
from ..compiler.ir.plan import DATA, PIPELINE, TENSOR, Plan
from ..compiler.sharding.sharding import make_sharding
from ..compiler.sharding.zero import zero_layouts
from ..cost_models.analysis import batch_rows
from ..cost_models.ops import price
from .columns import Column, column_of, layouts_key, parameters_of, stage_devices
from .context import Context
from .layout_pins import held_placements
from .layouts.choose import LayoutChoice, plan_layouts
from .layouts.facts import GraphFacts
from .layouts.statement import LayoutOptions
from .offload import offloaded
from .partition.fitting import Fit, find_fitting, with_memory
from .partition.from_graph import state_problem
from .partition.prepare import stage_counts, state
from .partition.search import SearchLimits, Solution, Tables, estimate, search
from .partition.statement import Statement
from .pinned import updates_elementwise
from .recompute import choose_recompute

__all__ = ["Candidate", "Pricing", "Way"]

_TYPICAL = 1.1  # the additive bound of memory, as a share of the need
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
    """A priced plan without stages; its layouts' bound is `share` of what they cost."""

    plan: Plan
    way: Way
    seconds: float
    lower_bound: float
    share: float


class Pricing:
    """Prices plans for one graph and cluster; layouts and columns are made once."""

    def __init__(self, plan: Plan, context: Context) -> None:
        self.plan = plan
        self.context = context
        self.rows = batch_rows(context.graph)
        self._work: dict[int, float] = {}
        self._layouts: dict[object, LayoutChoice | None] = {}
        self._candidates: dict[tuple[Mesh, int, Way], Candidate | None] = {}
        self._unfit: dict[tuple[Mesh, Way], int] = {}  # with so many microbatches or fewer
        self._short: dict[tuple[Mesh, float, bool], int] = {}  # likewise, of memory for layouts
        self._columns: dict[object, Column] = {}
        self._recompute: dict[str, tuple[int, ...]] = {}
        self._statements: dict[object, Statement] = {}

    @functools.cached_property
    def facts(self) -> GraphFacts:
        return GraphFacts.of(self.context.graph)

    def work_seconds(self, count: int) -> float:
        """Of the whole batch in `count` microbatches on one device, launches not counted."""
        if count not in self._work:
            kind = replace(self.plan.cluster.type_of(0), overhead_seconds=0.0)
            costs = price(self.context.graph, kind, batch_fraction=self._portion(count))
            self._work[count] = count * sum(cost.total_seconds for cost in costs)
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
        found = self._priced(mesh, count, way)
        if not self._sums_are_late(mesh, count, way):
            return found
        # layouts that sum less may be faster
        plan = self.plan_on(mesh, count, way, late=True)
        if found is not None and plan == found.plan:  # best by both forms, so by the larger
            late = self._share(mesh, count, way, late=True)
            share = min(found.share, late)
            scale = share / found.share if found.share else 0.0
            return replace(found, lower_bound=scale * found.lower_bound, share=share)
        others = self._priced(mesh, count, way, late=True)
        best = min(
            (item for item in (found, others) if item is not None),
            key=lambda item: item.seconds,
            default=None,
        )
        if best is None:
            return None
        bound = min(best.lower_bound, self.layout_bound(mesh, count))
        return replace(best, lower_bound=bound, share=0.0)

    def _share(self, mesh: Mesh, count: int, way: Way, *, late: bool) -> float:
        """What no layouts are better than, as a share of the chosen ones."""
        choice = self._choice(mesh, count, saving=way.saving, offload=way.offload, late=late)
        assert choice is not None
        return choice.lower_bound / choice.objective if choice.objective else 1.0

    def _priced(self, mesh: Mesh, count: int, way: Way, *, late: bool = False) -> Candidate | None:
        """With layouts for sums of gradients that backward hides, or hides in part (`late`)."""
        plan = self.plan_on(mesh, count, way, late=late)
        if plan is None:
            return None
        share = 1.0
        if plan.stage_mesh.axes:
            choice = self._choice(mesh, count, saving=way.saving, offload=way.offload, late=late)
            assert choice is not None
            if self._is_far_too_large(plan, way, choice):
                return None
            share = self._share(mesh, count, way, late=late)
        statement, counts = self._pipeline(plan)
        if statement is None or self._is_too_large(plan, statement):
            return None
        problem = with_memory(state_problem(statement, plan.num_microbatches), _TYPICAL)
        limits = SearchLimits(tolerance=self.context.options.tolerance, num_orders=1)
        solution = estimate(problem, counts, limits)
        if math.isinf(solution.seconds):
            return None
        return Candidate(plan, way, solution.seconds, solution.lower_bound * share, share)

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

    def searched(self, plan: Plan) -> Solution:
        """Stages of `plan` over the units of the captured graph, with a proof."""
        statement, counts = self._pipeline(plan)
        assert statement is not None
        problem = with_memory(state_problem(statement, plan.num_microbatches), _TYPICAL)
        return search(problem, counts, self._limits())

    def _limits(self) -> SearchLimits:
        options = self.context.options
        limit = min(_LOOK_SECONDS, options.time_limit_seconds)
        return SearchLimits(tolerance=options.tolerance, time_limit=limit, seed=options.seed)

    # -- layouts -----------------------------------------------------------------------------------

    def plan_on(self, mesh: Mesh, count: int, way: Way, *, late: bool = False) -> Plan | None:
        """The plan before its stages, layouts in the order of the mesh's own axes; None if no
        layouts fit.

        Args:
            late: see `_choice`.
        """
        recomputed = self._recomputed(way.recompute)
        plan = replace(self.plan, mesh=mesh, num_microbatches=count, recomputed=recomputed)
        if not plan.stage_mesh.axes:
            return offloaded(plan, self.context.graph) if way.offload else plan
        choice = self._choice(mesh, count, saving=way.saving, offload=way.offload, late=late)
        if choice is None:
            return None
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

    def _recomputed(self, how: str) -> tuple[int, ...]:
        if how not in self._recompute:
            self._recompute[how] = choose_recompute(self.context.graph, how)
        return self._recompute[how]

    def _sums_are_late(self, mesh: Mesh, count: int, way: Way) -> bool:
        """Whether sums of gradients may take longer than the last backward, which takes about as
        long as forward, or longer."""
        if self.plan.mode is Mode.INFER or all(axis.name == PIPELINE for axis in mesh.axes):
            return False
        choice = self._choice(mesh, count, saving=way.saving, offload=way.offload)
        if choice is None:
            return False
        backward = choice.seconds / 2 * self._portion(count) / self._like(count)
        return choice.sum_seconds > backward

    def _choice(
        self,
        mesh: Mesh,
        count: int,
        *,
        saving: float,
        offload: bool,
        bounding: bool = False,
        late: bool = False,
    ) -> LayoutChoice | None:
        """Layouts over the in-stage axes; with `saving`, those that fit a share of the memory,
        which holds no states if they are to `offload`.

        Microbatches of like size share layouts: rows count up to the next power of four. What is
        done once a step is spread over the microbatches, fill and drain of the pipeline included:
        to the nearest power of two, unless it is for `bounding`. Sums of gradients count as hidden
        but for a part, or if they are `late`, as all that the last backward cannot hide.
        """
        inner = Mesh(tuple(axis for axis in mesh.axes if axis.name != PIPELINE))
        stages = mesh.axis(PIPELINE).size
        like = self._like(count)
        spread = self._spread(mesh, count)
        if not bounding:
            spread = float(1 << max(0, round(math.log2(spread))))
        key = (str(inner), like, spread, late, saving and (saving, count, offload))
        if key in self._layouts:
            return self._layouts[key]
        if saving and count <= self._short.get((mesh, saving, offload), 0):
            return None
        if mesh.axis(TENSOR).size > 1 and not updates_elementwise(self.plan.optimizer.name):
            return None
        optimizer = self.plan.optimizer
        if saving and offload:
            optimizer = replace(optimizer, state_bytes_per_parameter_byte=0.0)
        options = LayoutOptions(
            num_microbatches=spread,
            batch_fraction=like,
            in_flight=min(stages, count) * self._portion(count),
            memory_bytes=math.floor(saving * stages * self._memory_bytes()) if saving else None,
            optimizer=optimizer,
            update_share=self._update_share(mesh),
            held=held_placements(self.context.graph, self.context.options.layout_pins, inner),
        )
        if late:
            rounds = stages + count - 1
            options = replace(options, sum_share=1.0, backward_share=1.0 - 1.0 / rounds)
        devices = stage_devices(mesh)[0]
        try:
            choice = plan_layouts(
                self.context.graph, inner, self.plan.cluster, devices, options, self.facts
            )
        except InfeasibleError:
            choice = None
            self._short[mesh, saving, offload] = count
        self._layouts[key] = choice
        return choice

    def _portion(self, count: int) -> float:
        """Rows of one of `count` microbatches, as a multiple of those that were captured."""
        return self.plan.batch_size / count / self.rows

    def _like(self, count: int) -> float:
        """`_portion` up to the next power of four."""
        return 4.0 ** math.ceil(math.log(self._portion(count), 4) - 1e-9)

    def _spread(self, mesh: Mesh, count: int) -> float:
        """Microbatches that a step takes, in such of like size."""
        rounds = mesh.axis(PIPELINE).size + count - 1
        return rounds * self._portion(count) / self._like(count)

    def _update_share(self, mesh: Mesh) -> float:
        """What a rank updates of what it holds, if the ranks of the data axis may share it."""
        shares = self.context.options.zero != 0 and updates_elementwise(self.plan.optimizer.name)
        return 1.0 / mesh.axis(DATA).size if shares else 1.0

    def layout_bound(self, mesh: Mesh, count: int) -> float:
        """No plan on `mesh` with `count` microbatches is faster, whatever its layouts.

        With t the seconds of a microbatch through all stages and u those of the update and of sums
        of gradients as far as they are exposed, the step takes (p + m - 1) / p t + u / p at least,
        as the slowest stage takes no less than the mean. Exposed are most of what one backward
        cannot hide, and a part in any case (`cost_models/overlap.py`); each gives a bound. Layouts
        are chosen for t of as many rows or more, which take no more time a row, and for the share
        of the update that is left with ZeRO. Recomputation, and ZeRO beyond that, only add.
        """
        if all(axis.name == PIPELINE for axis in mesh.axes):
            return 0.0
        bounds = []
        late = self._sums_are_late(mesh, count, Way(0, 0.0, "none"))
        for way in (False, True) if late else (False,):
            choice = self._choice(mesh, count, saving=0.0, offload=False, bounding=True, late=way)
            if choice is None:
                return math.inf
            bounds.append(choice.lower_bound)
        return self._spread(mesh, count) / mesh.axis(PIPELINE).size * max(bounds)

    def _memory_bytes(self) -> int:
        limit = self.plan.cluster.type_of(0).memory_bytes
        return min(limit, self.context.options.memory_limit_bytes or limit)

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
        if len(statement.units) < plan.mesh.axis(PIPELINE).size:
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
        saved = self._portion(plan.num_microbatches) * choice.saved_bytes
        return choice.static_bytes + saved > _FAR * self._memory_bytes()

    def _is_too_large(self, plan: Plan, statement: Statement) -> bool:
        """Whether parameters, gradients and states alone exceed the memory of all stages."""
        held = sum(value.type.num_bytes for value in statement.graph.values_of(ValueKind.PARAMETER))
        held += sum(e.gradient_bytes + e.state_bytes for e in statement.parameters.values())
        stages = plan.mesh.axis(PIPELINE).size
        host = self.plan.cluster.type_of(0).host
        away = sum(e.host_bytes for e in statement.parameters.values())
        if host is not None and away > stages * host.memory_bytes:
            return True
        return held > stages * self._memory_bytes()
