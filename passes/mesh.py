"""Decides the mesh: how many devices share the batch (data), the layers (pipeline) and the tensors
(tensor); with it the layout of every tensor, the level of ZeRO and the number of microbatches.

For every way to write the number of devices as data x pipeline x tensor, layouts are chosen by
integer programming (`layouts/`), and the pipeline of one column is priced by dynamic programming
(`partition/`) for each number of microbatches, with the least ZeRO that fits. Meshes come in the
order of a bound that assumes perfect division,

    step >= (p + m - 1) / (p m) W / (d t)

with W the seconds of the whole batch on one device; those whose bound is no better than the best
step found are not looked at, and the certificate covers them by it.

Ranks follow the axes in the order pipeline, data, tensor or data, pipeline, tensor: tensor-parallel
ranks lie closest together, as they talk most (Narayanan et al., Megatron-LM, 2021).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..compiler.ir.cluster import Cluster
from ..compiler.ir.errors import InfeasibleError, UsageError
from ..compiler.ir.graph import Mode, ValueKind
from ..compiler.ir.mesh import Mesh, MeshAxis
from ..compiler.ir.plan import DATA, PIPELINE, TENSOR, Certificate, Plan
from ..compiler.sharding.sharding import make_sharding
from ..compiler.sharding.zero import zero_layouts
from ..cost_models.analysis import batch_rows
from ..cost_models.ops import price
from .columns import Column, column_of, parameters_of, stage_devices
from .context import Context, PlanOptions
from .layouts.choose import LayoutChoice, plan_layouts
from .layouts.statement import LayoutOptions
from .microbatches import candidates, pinned_count
from .partition.fitting import find_fitting, with_memory
from .partition.from_graph import state_problem
from .partition.prepare import stage_counts, state
from .partition.search import SearchLimits, Solution, Tables, estimate, search
from .partition.statement import Statement
from .pinned import check_pinned, updates_elementwise

__all__ = ["ChooseMesh", "mesh_is_open", "meshes"]

_PROVEN = 4
_TYPICAL = 1.1  # the additive bound of memory, as a share of the need


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A priced plan without stages; its layouts' bound is `share` of what they cost."""

    plan: Plan
    seconds: float
    lower_bound: float
    share: float


@dataclass(frozen=True, slots=True)
class ChooseMesh:
    """Pass: fills `plan.mesh`, layouts, `plan.num_microbatches` and a first certificate."""

    name: str = "mesh"

    def run(self, plan: Plan, context: Context) -> Plan:
        check_pinned(plan.cluster, plan.mode, context.options)
        if not mesh_is_open(plan.cluster, plan.mode, context.options):
            return plan
        return _Search(plan, context).run()


def mesh_is_open(cluster: Cluster, mode: Mode, options: PlanOptions) -> bool:
    """Whether there is a mesh to choose: devices of one kind, and nothing that fixes stages."""
    if options.mesh is not None:
        return True
    kinds = {device.type for device in cluster.devices}
    fixed = options.num_stages is not None or options.pins or options.device_pins
    trains = mode is Mode.TRAIN
    return trains and len(kinds) == 1 and len(cluster.devices) > 1 and not fixed


def meshes(num_devices: int, rows: int) -> Iterator[Mesh]:
    """Every data x pipeline x tensor of `num_devices`, in both orders where they differ; the data
    axis divides `rows`."""
    for data in _divisors(math.gcd(num_devices, rows)):
        for tensor in _divisors(num_devices // data):
            stages = num_devices // data // tensor
            axes = {DATA: data, PIPELINE: stages, TENSOR: tensor}
            orders = [(PIPELINE, DATA, TENSOR)]
            if data > 1 and stages > 1:
                orders.append((DATA, PIPELINE, TENSOR))
            for order in orders:
                yield Mesh(tuple(MeshAxis(name, axes[name]) for name in order if axes[name] > 1))


def _divisors(number: int) -> Iterator[int]:
    return (divisor for divisor in range(1, number + 1) if number % divisor == 0)


class _Search:
    """Working state of the search."""

    def __init__(self, plan: Plan, context: Context) -> None:
        self.plan = plan
        self.context = context
        self.rows = batch_rows(context.graph)
        kind = replace(plan.cluster.type_of(0), overhead_seconds=0.0)
        costs = price(context.graph, kind)
        self.work = sum(cost.total_seconds for cost in costs) * plan.batch_size / self.rows
        self.layouts: dict[tuple[str, int], LayoutChoice | None] = {}
        self.columns: dict[object, Column] = {}
        self.statements: dict[object, Statement] = {}
        self.found: list[_Candidate] = []
        self.bounds: list[float] = []  # of what was not looked at

    def run(self) -> Plan:
        for mesh, count in sorted(self.space(), key=lambda item: (self.bound(*item), str(item[0]))):
            best = min((item.seconds for item in self.found), default=math.inf)
            if self.bound(mesh, count) >= best:
                self.bounds.append(self.bound(mesh, count))
            else:
                self.look_at(mesh, count)
        return self.finish()

    def space(self) -> list[tuple[Mesh, int]]:
        """Meshes with numbers of microbatches."""
        plan, options = self.plan, self.context.options
        pinned = options.mesh
        every = meshes(len(plan.cluster.devices), self.rows) if pinned is None else (pinned,)
        table = []
        for mesh in every:
            data, stages = mesh.axis(DATA).size, mesh.axis(PIPELINE).size
            if options.zero and data == 1:
                continue
            counts = [
                count
                for count in _microbatch_counts(plan, self.context, stages)
                if plan.batch_size // count % data == 0
            ]
            table += [(mesh, count) for count in counts]
        if not table:
            raise UsageError(
                f"no number of microbatches of a batch of {plan.batch_size} rows suits the mesh",
                where="mesh",
                ways_out=("let the data axis divide the rows of a microbatch",),
            )
        return table

    def bound(self, mesh: Mesh, count: int) -> float:
        """No plan on `mesh` with `count` microbatches is faster."""
        stages = mesh.axis(PIPELINE).size
        inner = mesh.axis(DATA).size * mesh.axis(TENSOR).size
        return (stages + count - 1) / (stages * count) * self.work / inner

    def look_at(self, mesh: Mesh, count: int) -> None:
        """Price the plans on `mesh` with `count` microbatches: least ZeRO first."""
        if all(axis.name == PIPELINE for axis in mesh.axes):
            plan = replace(self.plan, mesh=mesh, num_microbatches=count)
            self.keep(self.evaluate(plan), 0)
            return
        for saving in (False, True):
            choice = self.choose_layouts(mesh, count, saving)
            if choice is None:
                continue
            for level in self.levels(mesh):
                plan = self.with_layouts(mesh, count, choice, level)
                share = choice.lower_bound / choice.objective if choice.objective else 1.0
                if self.keep(self.evaluate(plan, share), level):
                    return

    def keep(self, candidate: _Candidate | None, level: int) -> bool:
        if candidate is None:
            return False
        self.found.append(candidate)
        plan = candidate.plan
        self.context.progress(
            f"mesh {plan.mesh}, {plan.num_microbatches} microbatches, ZeRO-{level}: "
            f"{candidate.seconds:.6g} s a step"
        )
        return True

    def levels(self, mesh: Mesh) -> tuple[int, ...]:
        pinned = self.context.options.zero
        if pinned is not None:
            return (pinned,)
        splits = mesh.axis(DATA).size > 1 and updates_elementwise(self.plan.optimizer.name)
        return (0, 1, 2, 3) if splits else (0,)

    def choose_layouts(self, mesh: Mesh, count: int, saving: bool) -> LayoutChoice | None:
        """Layouts over the in-stage axes; with `saving`, those that fit a share of the memory."""
        inner = Mesh(tuple(axis for axis in mesh.axes if axis.name != PIPELINE))
        stages = mesh.axis(PIPELINE).size
        key = (str(inner), saving and count)
        if key in self.layouts:
            return self.layouts[key]
        if mesh.axis(TENSOR).size > 1 and not updates_elementwise(self.plan.optimizer.name):
            return None
        memory = None
        if saving:
            limit = self.plan.cluster.type_of(0).memory_bytes
            memory = stages * min(limit, self.context.options.memory_limit_bytes or limit)
        options = LayoutOptions(
            num_microbatches=stages + count - 1,
            in_flight=min(stages, count) * self.plan.batch_size / count / self.rows,
            memory_bytes=memory,
            optimizer=self.plan.optimizer,
        )
        devices = stage_devices(mesh)[0]
        try:
            choice = plan_layouts(self.context.graph, inner, self.plan.cluster, devices, options)
        except InfeasibleError:
            choice = None
        self.layouts[key] = choice
        return choice

    def evaluate(self, plan: Plan, share: float = 1.0) -> _Candidate | None:
        """The step of `plan`, whose layouts are within `share` of their bound; None if it does not
        fit."""
        statement, counts = self.pipeline(plan)
        if statement is None or self.is_too_large(plan, statement):
            return None
        problem = with_memory(state_problem(statement, plan.num_microbatches), _TYPICAL)
        limits = SearchLimits(tolerance=self.context.options.tolerance, num_orders=1)
        solution = estimate(problem, counts, limits)
        if math.isinf(solution.seconds):
            return None
        return _Candidate(plan, solution.seconds, solution.lower_bound * share, share)

    def pipeline(self, plan: Plan) -> tuple[Statement | None, tuple[int, ...]]:
        """The pipeline of one column; none if the model has fewer parts than stages.

        Plans that differ in microbatches only have the same, and if they hold the same parts of
        parameters, the same but for what gradients and states take.
        """
        held = tuple(entry.held for entry in plan.parameter_layouts)
        key = (str(plan.mesh), plan.node_layouts, held)
        if key not in self.columns:
            self.columns[key] = column_of(plan, self.context)
            self.statements[key] = state(self.columns[key].plan, self.columns[key].context)
        column, statement = self.columns[key], self.statements[key]
        if len(statement.units) < plan.mesh.axis(PIPELINE).size:
            return None, ()
        parameters = parameters_of(plan, self.context.graph, column)
        counts = stage_counts(column.plan, column.context, len(statement.units))
        return replace(statement, parameters=parameters), counts

    def is_too_large(self, plan: Plan, statement: Statement) -> bool:
        """Whether parameters, gradients and states alone exceed the memory of all stages."""
        held = sum(value.type.num_bytes for value in statement.graph.values_of(ValueKind.PARAMETER))
        held += sum(e.gradient_bytes + e.state_bytes for e in statement.parameters.values())
        limit = plan.cluster.type_of(0).memory_bytes
        limit = min(limit, self.context.options.memory_limit_bytes or limit)
        return held > plan.mesh.axis(PIPELINE).size * limit

    def with_layouts(self, mesh: Mesh, count: int, choice: LayoutChoice, level: int) -> Plan:
        """The plan before its stages, layouts in the order of the mesh's own axes."""
        parameters = choice.parameter_layouts
        if level:
            sharding = make_sharding(
                self.context.graph,
                choice.mesh,
                choice.node_layouts,
                choice.layouts,
                choice.parameter_layouts,
            )
            parameters = zero_layouts(self.context.graph, sharding, DATA, level)
        return replace(
            self.plan,
            mesh=mesh,
            node_layouts=choice.node_layouts,
            layouts=choice.layouts,
            parameter_layouts=parameters,
            num_microbatches=count,
        )

    def finish(self) -> Plan:
        """The fastest candidate that fits by liveness."""
        ordered = sorted(self.found, key=lambda item: item.seconds)
        for candidate in ordered:
            if self.fits(candidate):
                floor = min([candidate.seconds, *self.bounds, *self.proven(candidate.seconds)])
                certificate = Certificate(
                    objective=candidate.seconds,
                    lower_bound=floor,
                    gap=max(0.0, 1.0 - floor / candidate.seconds) if candidate.seconds else 0.0,
                    search_space=self.told(),
                    solver="",
                    solver_seconds=0.0,
                )
                return self.warned(replace(candidate.plan, certificate=certificate))
        return self.smallest()

    def warned(self, plan: Plan) -> Plan:
        """A level of ZeRO that was asked for and has nothing to split is not dropped in silence."""
        level = self.context.options.zero
        if not level or plan.zero_level == level:
            return plan
        text = (
            f"ZeRO-{level} was asked for, the plan has ZeRO-{plan.zero_level}: over the {DATA} "
            "axis no parameter has a gradient of terms to be summed that could be split (the batch "
            "is too small to be worth splitting)"
        )
        return replace(plan, warnings=(*plan.warnings, text))

    def proven(self, best: float) -> Iterator[float]:
        """Bounds of all that was looked at; where the bound of the dynamic program is below the
        best step, the integer program is asked as well, for the few where it is lowest."""
        for number, candidate in enumerate(sorted(self.found, key=lambda item: item.lower_bound)):
            bound = candidate.lower_bound
            if bound < best and number < _PROVEN:
                bound = max(bound, self.searched(candidate).lower_bound * candidate.share)
            yield bound

    def searched(self, candidate: _Candidate) -> Solution:
        statement, counts = self.pipeline(candidate.plan)
        assert statement is not None
        problem = state_problem(statement, candidate.plan.num_microbatches)
        options = self.context.options
        limits = SearchLimits(tolerance=options.tolerance, time_limit=1.0, seed=options.seed)
        return search(with_memory(problem, _TYPICAL), counts, limits)

    def told(self) -> str:
        if self.context.options.mesh is not None:
            return f"mesh {self.context.options.mesh}, its layouts, ZeRO, microbatches"
        return (
            f"all data x pipeline x tensor meshes of {len(self.plan.cluster.devices)} devices with "
            "their layouts, ZeRO 0 to 3, microbatches"
        )

    def fits(self, candidate: _Candidate) -> bool:
        statement, counts = self.pipeline(candidate.plan)
        assert statement is not None
        problem = state_problem(statement, candidate.plan.num_microbatches)
        limits = SearchLimits(tolerance=self.context.options.tolerance, num_orders=1)
        tables = Tables.of(problem, limits)
        fit = find_fitting(
            statement, problem, counts, lambda other: estimate(other, counts, limits, tables)
        )
        return fit is not None

    def smallest(self) -> Plan:
        """Nothing fits: what needs least, so that the error of the next pass is about that."""
        count = len(self.plan.cluster.devices)
        pinned = self.context.options.mesh
        mesh = pinned or Mesh((MeshAxis(PIPELINE, count),))
        counts = _microbatch_counts(self.plan, self.context, mesh.axis(PIPELINE).size)
        if all(axis.name == PIPELINE for axis in mesh.axes):
            return replace(self.plan, num_microbatches=counts[-1])
        choice = self.choose_layouts(mesh, counts[-1], True)
        choice = choice or self.choose_layouts(mesh, counts[-1], False)
        assert choice is not None
        return self.with_layouts(mesh, counts[-1], choice, self.levels(mesh)[-1])


def _microbatch_counts(plan: Plan, context: Context, stages: int) -> list[int]:
    pinned = pinned_count(plan, context)
    if pinned is not None:
        return [pinned]
    inputs = context.graph.values_of(ValueKind.INPUT)
    if not any(value.batch_dim is not None for value in inputs):
        return [1]
    return list(candidates(plan.batch_size, stages))
