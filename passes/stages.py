"""Decides the stages: which nodes run on which device.

From the graph's units, their costs and the cluster to `plan.stages` and `plan.certificate`, by
integer programming (`partition/ilp.py`) under the memory limits of every device. The planner's
memory figures are additive bounds; the stages found are checked by liveness once more.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..compiler.ir.errors import InfeasibleError, UsageError
from ..compiler.ir.plan import Certificate, Plan, Stage
from ..cost_models.analysis import batch_rows
from ..cost_models.memory import memory_model, stage_memory
from .context import Context
from .partition.diagnosis import explain_infeasible
from .partition.from_graph import Statement, state_problem
from .partition.problem import Assignment, StageProblem
from .partition.search import SearchLimits, Solution, search
from .partition.statement import stage_counts, state
from .replicate import needed_replicas, replicated_nodes

__all__ = ["PartitionStages", "stages_of"]

_ATTEMPTS = 4


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
        solution, stages = _solve_within_memory(plan, statement, problem, counts, limits)
        certificate = _certificate(
            statement, solution, counts, len(context.graph.nodes), time.perf_counter() - start
        )
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
) -> tuple[Solution, tuple[Stage, ...]]:
    """Solve; while a stage needs more than the additive bound promised, with less memory."""
    limit = [entry.memory_bytes for entry in problem.classes]
    attempt = problem
    for _ in range(_ATTEMPTS):
        solution = search(attempt, counts, limits)
        if solution.assignment is None:
            break
        stages = stages_of(statement, problem, solution.assignment)
        excess = _excess(plan, statement, problem, stages, solution.assignment)
        if max(excess) <= 0:
            return solution, stages
        attempt = replace(
            attempt,
            classes=tuple(
                replace(entry, memory_bytes=entry.memory_bytes - max(excess[index], 0))
                for index, entry in enumerate(attempt.classes)
            ),
        )
    assert limit == [entry.memory_bytes for entry in problem.classes]
    raise InfeasibleError(
        *explain_infeasible(statement, attempt, counts)
    )


def _excess(
    plan: Plan,
    statement: Statement,
    problem: StageProblem,
    stages: tuple[Stage, ...],
    assignment: Assignment,
) -> list[int]:
    """By class, how many bytes too many the worst stage needs, by liveness."""
    graph = statement.graph
    fraction = plan.batch_size / plan.num_microbatches / batch_rows(graph)
    models = {}
    excess = [0] * len(problem.classes)
    for stage in stages:
        backend = plan.cluster.type_of(stage.device).backend
        if backend not in models:
            models[backend] = memory_model(graph, batch_fraction=fraction, backend=backend)
        need = stage_memory(
            models[backend],
            stage.nodes,
            in_flight=problem.in_flight(len(stages), stage.index),
            optimizer=plan.optimizer,
            device=stage.device,
            num_microbatches=plan.num_microbatches,
        ).total_bytes
        index = assignment.classes[stage.index]
        excess[index] = max(excess[index], need - problem.classes[index].memory_bytes)
    return excess


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


def _certificate(
    statement: Statement, solution: Solution, counts: tuple[int, ...], num_nodes: int, seconds: float
) -> Certificate:
    import ortools

    space = (
        f"all monotone partitions of {len(statement.units)} units ({num_nodes} nodes) into "
        f"{_range(counts)} stages on any devices, under their memory limits"
    )
    return Certificate(
        objective=solution.seconds,
        lower_bound=solution.lower_bound,
        gap=max(0.0, (solution.seconds - solution.lower_bound) / solution.seconds),
        search_space=space,
        solver=f"{' + '.join(solution.methods)}, OR-Tools {ortools.__version__}",
        solver_seconds=seconds,
    )


def _range(counts: tuple[int, ...]) -> str:
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
