"""Decides the stages: which nodes run on which device.

From the graph's units, their costs and the cluster to `plan.stages` and `plan.certificate`, by
integer programming (`partition/ilp.py`) under the memory limits of every device. The planner's
memory figures are additive bounds; the stages found are checked by liveness once more.
"""

from __future__ import annotations

import importlib.metadata
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..compiler.ir.errors import UsageError
from ..compiler.ir.plan import Certificate, MemoryPrediction, Plan, Stage
from ..cost_models.analysis import batch_rows
from ..cost_models.memory import (
    MemoryModel,
    consuming_stages,
    memory_model,
    stage_memory,
)
from .context import Context
from .partition.diagnosis import closest_partition, infeasible, unsupported
from .partition.from_graph import state_problem
from .partition.objective import stage_figures, step_seconds
from .partition.prepare import stage_counts, state
from .partition.problem import Assignment, StageProblem
from .partition.search import SearchLimits, Solution, search, simple_bound
from .partition.statement import Statement
from .replicate import needed_replicas, replicated_nodes

__all__ = ["PartitionStages", "stages_of"]

_ATTEMPTS = 4
_GENEROUS = 1.25  # the additive bound of memory exceeds that by liveness by about this
_SMALLER = 0.995


@dataclass(frozen=True, slots=True)
class PartitionStages:
    """Pass: fills `plan.stages` and `plan.certificate`."""

    name: str = "stages"

    def run(self, plan: Plan, context: Context) -> Plan:
        start = time.perf_counter()
        statement = state(plan, context)
        problem = state_problem(statement, plan.num_microbatches)
        counts = stage_counts(plan, context, len(statement.units))
        _check_counts(plan, counts, len(statement.units))
        options = context.options
        limits = SearchLimits(
            tolerance=options.tolerance,
            time_limit=options.time_limit_seconds,
            seed=options.seed,
        )
        context.progress(
            f"partition {len(context.graph.nodes)} nodes in {len(statement.units)} units"
        )
        solution, stages, share = _solve_within_memory(plan, statement, problem, counts, limits)
        space = (
            f"all monotone partitions of {len(statement.units)} units "
            f"({len(context.graph.nodes)} nodes) into {_range(counts)} stages on any devices "
            f"whose additive bound of memory is at most {share:.4g} of the device's"
        )
        certificate = _certificate(solution, space, time.perf_counter() - start)
        return replace(plan, stages=stages, certificate=certificate)


def _check_counts(plan: Plan, counts: Sequence[int], num_units: int) -> None:
    devices = len(plan.cluster.devices)
    if not counts or counts[0] > min(devices, num_units) or counts[0] < 1:
        wanted = counts[0] if counts else 0
        raise UsageError(
            f"{wanted} stages wanted of {devices} devices and {num_units} separable parts",
            ways_out=(f"ask for 1 to {min(devices, num_units)} stages",),
        )


def _solve_within_memory(
    plan: Plan,
    statement: Statement,
    problem: StageProblem,
    counts: tuple[int, ...],
    limits: SearchLimits,
) -> tuple[Solution, tuple[Stage, ...], float]:
    """The fastest partition that fits by liveness.

    The additive bound of the problem exceeds the need by liveness by some share. So the problem is
    first solved with that much more memory than there is; while what is found does not fit, with
    the share that its worst stage shows, and at last with the memory that there is.

    Returns the solution, its stages, and the share of the memory that its bound may take up.

    Raises:
        InfeasibleError: nothing fits.
    """
    error = unsupported(statement, problem)
    if error is not None:
        raise error
    needs = _Needs.of(plan, statement, problem)
    share = _GENEROUS
    for attempt in range(_ATTEMPTS):
        solution = search(_with_memory(problem, share), counts, limits)
        if solution.assignment is not None:
            fitting = needs.fitting_share(solution.assignment)
            if fitting is None:
                return solution, stages_of(statement, problem, solution.assignment), share
            share = max(min(fitting, share * _SMALLER), 1.0)
        elif share == 1.0:
            break
        if attempt == _ATTEMPTS - 2:
            share = 1.0
    closest, _ = closest_partition(problem, counts)
    if needs.fitting_share(closest) is not None:
        raise infeasible(statement, problem, counts, closest, needs.by_liveness(closest))
    bound = min(simple_bound(problem, count) for count in counts)
    seconds = step_seconds(problem, closest)
    solution = Solution(closest, seconds, min(bound, seconds), ("least memory",))
    return solution, stages_of(statement, problem, closest), _GENEROUS


def _with_memory(problem: StageProblem, share: float) -> StageProblem:
    """`problem` on devices with `share` times their memory."""
    classes = tuple(
        replace(entry, memory_bytes=math.floor(entry.memory_bytes * share))
        for entry in problem.classes
    )
    return replace(problem, classes=classes)


@dataclass(frozen=True, slots=True)
class _Needs:
    """Memory of stages by liveness; one model for each kind of device."""

    plan: Plan
    statement: Statement
    problem: StageProblem
    models: dict[str, MemoryModel]

    @staticmethod
    def of(plan: Plan, statement: Statement, problem: StageProblem) -> _Needs:
        graph = statement.graph
        fraction = plan.batch_size / plan.num_microbatches / batch_rows(graph)
        used = {device.type for device in plan.cluster.devices}
        backends = sorted({entry.backend for entry in plan.cluster.types if entry.name in used})
        models = {
            backend: memory_model(graph, batch_fraction=fraction, backend=backend)
            for backend in backends
        }
        return _Needs(plan, statement, problem, models)

    def by_liveness(self, assignment: Assignment) -> tuple[MemoryPrediction, ...]:
        stages = stages_of(self.statement, self.problem, assignment)
        consumers = consuming_stages(self.statement.graph, stages)
        return tuple(
            stage_memory(
                self.models[self.plan.cluster.type_of(stage.device).backend],
                stage.nodes,
                in_flight=self.problem.in_flight(len(stages), stage.index),
                optimizer=self.plan.optimizer,
                device=stage.device,
                num_microbatches=self.plan.num_microbatches,
                consumers=consumers,
            )
            for stage in stages
        )

    def fitting_share(self, assignment: Assignment) -> float | None:
        """None if all stages fit; else the least additive bound of a stage that does not, as a
        share of its need by liveness."""
        bounds = stage_figures(self.problem, assignment)
        shares = [
            bound.memory_bytes / need.total_bytes
            for bound, need in zip(bounds, self.by_liveness(assignment), strict=True)
            if need.total_bytes > bound.limit_bytes
        ]
        return min(shares, default=None)


def stages_of(
    statement: Statement, problem: StageProblem, assignment: Assignment
) -> tuple[Stage, ...]:
    """Stages of the nodes of `assignment`, with the replicated nodes that each needs."""
    graph = statement.graph
    replicated = replicated_nodes(graph)
    groups: list[set[int]] = [set() for _ in assignment.classes]
    for unit, stage in enumerate(assignment.stages):
        groups[stage].update(statement.units[unit])
    for group in groups:
        group.update(needed_replicas(graph, replicated, group))
    placed = set().union(*groups)
    groups[-1].update(node.id for node in graph.nodes if node.id not in placed)
    devices = assignment.devices(problem)
    return tuple(
        Stage(index, device, tuple(sorted(group)))
        for index, (device, group) in enumerate(zip(devices, groups, strict=True))
    )


def _certificate(solution: Solution, space: str, seconds: float) -> Certificate:
    return Certificate(
        objective=solution.seconds,
        lower_bound=solution.lower_bound,
        gap=max(0.0, (solution.seconds - solution.lower_bound) / solution.seconds),
        search_space=space,
        solver=f"{' + '.join(solution.methods)}, OR-Tools {importlib.metadata.version('ortools')}",
        solver_seconds=seconds,
    )


def _range(counts: tuple[int, ...]) -> str:
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
