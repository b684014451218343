"""Decides the stages of a plan whose meshes are given, one a stage and in their order.

From these meshes, the graph's units and their prices on each stage's devices to stages with their
layouts, the number of microbatches, a prediction and a certificate. Layouts over a mesh are those
that are best for the whole graph on it (`layouts/`); parameters that several stages turn out to
share are whole over the tensor axis. Stages are runs of units in one topological order, and cuts
are chosen that minimise

    step = sum_s (t_s + r_s + g_s) + max_s ((m - 1) max(t_s + h (r_s + g_s), r_s, g_s) + u_s)

with t_s the seconds of one of m microbatches in stage s, r_s and g_s those of receiving its
boundary values and returning their gradients, h the share of transfers that computation waits for,
and u_s what the stage does once a step (`partition/runs.py`; `partition/objective.py` has the same
for one mesh). Stages that do not fit by liveness, and those that contain them, are left out, and it
is done again; where nothing fits, with a higher level of ZeRO, then with recomputation.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from ..compiler.ir.counts import divisors
from ..compiler.ir.errors import InfeasibleError
from ..compiler.ir.graph import Mode, ValueKind
from ..compiler.ir.mesh import Mesh, MeshAxis, Replicate, format_stage_meshes
from ..compiler.ir.plan import (
    DATA,
    PIPELINE,
    TENSOR,
    Certificate,
    MemoryPrediction,
    Plan,
    Prediction,
    Stage,
)
from ..compiler.sharding.sharding import Sharding
from ..compiler.sharding.unruled import unruled_warnings
from .context import Context, LayoutPin
from .own_stages import OwnStage, OwnStages, SplitParameter, StageFigures, shared_parameters
from .partition.prepare import schedule_name
from .partition.problem import in_flight_microbatches
from .partition.runs import Table, best_runs
from .pinned import check_pinned, updates_elementwise
from .recompute import choose_recompute
from .replicate import complete_stages

__all__ = ["PlanStageMeshes", "StageMeshSearch", "stage_groups"]

_A_STAGE = 4  # microbatches, about which numbers are priced
_MOST_COUNTS = 6


@dataclass(frozen=True, slots=True)
class PlanStageMeshes:
    """Pass: fills `plan.stages`, `plan.num_microbatches`, prediction and certificate."""

    name: str = "stage_meshes"

    def run(self, plan: Plan, context: Context) -> Plan:
        check_pinned(plan.cluster, plan.mode, context.options)
        known = OwnStages(plan, context)
        return StageMeshSearch(plan, known, context.options.stage_meshes).run()


@dataclass(frozen=True, slots=True)
class _Found:
    """Runs of units, one a stage, with what they take and need."""

    runs: tuple[tuple[int, int], ...]
    seconds: float
    stages: tuple[Stage, ...]
    memory: tuple[MemoryPrediction, ...]


class StageMeshSearch:
    """Working state of the search for stages on `meshes`.

    Args:
        known: stages of the graph, which searches on several meshes may share.
    """

    def __init__(self, plan: Plan, known: OwnStages, meshes: tuple[Mesh, ...]) -> None:
        self.meshes = meshes
        self.start = time.perf_counter()
        self.known = known
        axes = (MeshAxis(PIPELINE, len(meshes)),)
        self.plan = replace(plan, mesh=Mesh(axes))
        self.groups = stage_groups(meshes)
        self.units = known.units(len(meshes))

    @property
    def context(self) -> Context:
        return self.known.context

    def run(self, counts: Iterable[int] | None = None) -> Plan:
        """The fastest of the numbers of microbatches that fit, with the least saving that does.

        Raises:
            InfeasibleError: none does.
        """
        if len(self.units) < len(self.meshes):
            raise InfeasibleError(
                f"{len(self.meshes)} stages wanted of {len(self.units)} separable parts of the "
                "model",
                where="mesh",
                ways_out=("ask for fewer stages",),
            )
        short: InfeasibleError | None = None
        for zero, recompute in self.ways():
            plan = replace(self.plan, recomputed=choose_recompute(self.context.graph, recompute))
            table = []
            for count in self.counts() if counts is None else counts:
                try:
                    table.append(self.solved(replace(plan, num_microbatches=count), zero))
                except InfeasibleError as error:
                    short = error
            if table:
                return min(table, key=lambda item: item.objective_seconds)
        assert short is not None
        raise short

    def ways(self) -> Iterator[tuple[int, str]]:
        """Levels of ZeRO and what is recomputed, least first."""
        options = self.context.options
        trains = self.plan.mode is Mode.TRAIN
        has_data = any(mesh.axis(DATA).size > 1 for mesh in self.meshes)
        shares = trains and has_data and updates_elementwise(self.plan.optimizer.name)
        levels = (0, 1, 2, 3) if shares else (0,)
        if options.zero is not None:
            levels = (options.zero,)
        kinds = ("none", "selective", "full") if options.recompute == "auto" and trains else ()
        for kind in kinds or (options.recompute,):
            yield from ((level, kind) for level in levels)

    def counts(self) -> tuple[int, ...]:
        """Numbers of microbatches whose rows every data axis divides, about four a stage."""
        pinned = self.context.options.num_microbatches
        if pinned is not None:
            return (pinned,)
        inputs = self.context.graph.values_of(ValueKind.INPUT)
        if all(value.batch_dim is None for value in inputs):
            return (1,)
        rows, parts = self.plan.batch_size, [mesh.axis(DATA).size for mesh in self.meshes]
        legal = divisors(rows)
        even = [n for n in legal if all(rows // n % size == 0 for size in parts)]
        wanted = _A_STAGE * len(self.meshes)
        near = sorted(even or legal, key=lambda n: max(n / wanted, wanted / n))
        return tuple(sorted(near[:_MOST_COUNTS]))

    def solved(self, plan: Plan, zero: int) -> Plan:
        """The best cuts for a number of microbatches.

        Raises:
            InfeasibleError: nothing fits, or no layouts over a mesh are legal.
        """
        while True:
            try:
                return self.solved_once(plan, zero)
            except SplitParameter as error:
                self.hold_whole(error)

    def hold_whole(self, error: SplitParameter) -> None:
        """Pin a parameter that several stages share to be whole over the tensor axis.

        Raises:
            InfeasibleError: it is so already.
        """
        pin = LayoutPin(error.parameter, TENSOR, Replicate())
        options = self.context.options
        if pin in options.layout_pins:
            raise error
        options = replace(options, layout_pins=(*options.layout_pins, pin))
        self.known = OwnStages(self.known.plan, replace(self.context, options=options))

    def solved_once(self, plan: Plan, zero: int) -> Plan:
        """As `solved`; raises SplitParameter where stages would share parts of one."""
        stages = [
            self.known.stage(plan, mesh, group, zero)
            for mesh, group in zip(self.meshes, self.groups, strict=True)
        ]
        tables = self.figures(plan, zero)
        forbidden: list[tuple[int, int, int]] = []  # stage and run
        while True:
            priced = [(table.first, table.later(plan.num_microbatches)) for table in tables]
            runs = best_runs(priced, forbidden)
            if runs is None:
                raise self.too_large(forbidden)
            found = self.found(plan, runs, stages, tables)
            over = self.over(found)
            if not over:
                return self.finished(plan, found, tables)
            forbidden += over

    def figures(self, plan: Plan, zero: int) -> list[StageFigures]:
        """Of the stages of `plan`, by run of units."""
        before = (None, *self.groups)
        return [
            self.known.figures(plan, mesh, group, zero, last)
            for mesh, group, last in zip(self.meshes, self.groups, before, strict=False)
        ]

    def quick(self, count: int) -> tuple[float, float] | None:
        """Seconds of a step if everything fitted, and what no stages take less than if ZeRO, too,
        shares what is done once a step; None if no layouts are legal or there are too few units."""
        zero, recompute = next(self.ways())
        recomputed = choose_recompute(self.context.graph, recompute)
        plan = replace(self.plan, recomputed=recomputed, num_microbatches=count)
        if len(self.units) < len(self.meshes):
            return None
        try:
            tables = self.figures(plan, zero)
        except InfeasibleError:
            return None
        whole = self.step_seconds([(table.first, table.later(count)) for table in tables])
        shared = [
            (table.first, (count - 1) * table.steady + self.least_share(mesh) * table.per_step)
            for mesh, table in zip(self.meshes, tables, strict=True)
        ]
        return whole, self.step_seconds(shared)

    def least_share(self, mesh: Mesh) -> float:
        """Of what a stage does once a step, what is left at least whatever ZeRO shares: updates are
        split over the data axis, and instead of a sum there may be the scattering half of it, or
        nothing that is known where collectives were measured one by one."""
        data = mesh.axis(DATA).size
        if data > 1 and any(rule.collectives for rule in self.plan.cluster.links):
            return 0.0
        return 1.0 / data

    def step_seconds(self, tables: list[tuple[Table, Table]]) -> float:
        runs = best_runs(tables)
        if runs is None:
            return math.inf
        pairs = list(zip(tables, runs, strict=True))
        way = sum(float(first[run]) for (first, _), run in pairs)
        return way + max(float(later[run]) for (_, later), run in pairs)

    def found(
        self,
        plan: Plan,
        runs: tuple[tuple[int, int], ...],
        stages: list[OwnStage],
        tables: list[StageFigures],
    ) -> _Found:
        """Stages of whole runs, with the memory that they need."""
        graph, count = self.context.graph, plan.num_microbatches
        nodes = [{node for unit in self.units[a:b] for node in unit} for a, b in runs]
        complete_stages(graph, nodes)
        shared = shared_parameters(graph, nodes)
        cut = tuple(
            stage.cut(index, tuple(sorted(inside)), shared)
            for index, (stage, inside) in enumerate(zip(stages, nodes, strict=True))
        )
        schedule = schedule_name(plan, self.context)
        memory: list[MemoryPrediction] = []
        for index, (stage, part) in enumerate(zip(stages, cut, strict=True)):
            in_flight = in_flight_microbatches(schedule, count, len(cut), index)
            memory += stage.memory(part, cut, in_flight)
        pairs = list(zip(tables, runs, strict=True))
        way = sum(table.first[run] for table, run in pairs)
        slowest = max(table.later(count)[run] for table, run in pairs)
        return _Found(runs, float(way + slowest), cut, tuple(memory))

    def over(self, found: _Found) -> list[tuple[int, int, int]]:
        """The stages that exceed the memory of their devices."""
        need = {entry.device: entry.total_bytes for entry in found.memory}
        return [
            (stage.index, *found.runs[stage.index])
            for stage in found.stages
            if any(need[device] > self.limit(device) for device in stage.devices)
        ]

    def warnings(self, found: _Found) -> Iterator[str]:
        """What the user should know: operators that could not be split, stage by stage."""
        for stage in found.stages:
            view = replace(self.plan, stages=found.stages).of_stage(stage)
            graph = self.context.graph
            for warning in unruled_warnings(graph, Sharding.of(view, graph)):
                yield f"stage {stage.index}: {warning}"

    def limit(self, device: int) -> int:
        own = self.plan.cluster.type_of(device).memory_bytes
        return min(own, self.context.options.memory_limit_bytes or own)

    def too_large(self, forbidden: list[tuple[int, int, int]]) -> InfeasibleError:
        """The stage that was refused with the fewest units."""
        stage, first, last = min(forbidden, key=lambda item: item[2] - item[1])
        return InfeasibleError(
            f"stage {stage} over {str(self.meshes[stage]) or 'one device'} does not fit into "
            f"{self.limit(self.groups[stage][0])} bytes even with {last - first} of "
            f"{len(self.units)} parts of the model",
            where=f"mesh {format_stage_meshes(self.meshes)}",
            ways_out=("give the stage more devices", "use more stages", "use a smaller batch"),
        )

    def finished(self, plan: Plan, found: _Found, tables: list[StageFigures]) -> Plan:
        forward = tuple(
            float(table.forward[a, b]) for table, (a, b) in zip(tables, found.runs, strict=True)
        )
        backward = tuple(
            float(table.backward[a, b]) for table, (a, b) in zip(tables, found.runs, strict=True)
        )
        busy = plan.num_microbatches * (sum(forward) + sum(backward))
        bubble = 1.0 - busy / (len(found.stages) * found.seconds) if found.seconds else 0.0
        told = format_stage_meshes(self.meshes)
        self.context.progress(
            f"meshes {told}, {plan.num_microbatches} microbatches: {found.seconds:.6g} s a step"
        )
        plan = replace(plan, stages=found.stages, warnings=(*plan.warnings, *self.warnings(found)))
        return replace(
            plan,
            prediction=Prediction(
                step_seconds=found.seconds,
                bubble_fraction=min(max(bubble, 0.0), 1.0),
                stage_forward_seconds=forward,
                stage_backward_seconds=backward,
                memory=tuple(sorted(found.memory, key=lambda entry: entry.device)),
            ),
            certificate=Certificate(
                objective=found.seconds,
                lower_bound=found.seconds,
                gap=0.0,
                search_space=(
                    f"stages on the meshes {told} that were asked for, each a run of "
                    f"{len(self.units)} units in one order that fits by liveness, under the "
                    "layouts that are fastest for the whole model on each mesh, with "
                    f"{plan.num_microbatches} microbatches"
                ),
                solver="dynamic programming over runs of units",
                solver_seconds=time.perf_counter() - self.start,
            ),
        )


def stage_groups(meshes: Iterable[Mesh]) -> tuple[tuple[int, ...], ...]:
    """Devices of each stage: the next ones."""
    ends = itertools.accumulate((mesh.size for mesh in meshes), initial=0)
    return tuple(tuple(range(a, b)) for a, b in itertools.pairwise(ends))
