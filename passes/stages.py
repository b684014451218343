"""Decides the stages: which nodes run on which device.

From the graph's units, their costs and the cluster to `plan.stages` and `plan.certificate`, by
integer programming (`partition/ilp.py`) under the memory limits of every device. The planner's
memory figures are additive bounds; the stages found are checked by liveness once more.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..compiler.ir.errors import InfeasibleError
from ..compiler.ir.graph import Mode
from ..compiler.ir.mesh import Mesh, MeshAxis
from ..compiler.ir.plan import PIPELINE, Certificate, Plan, Stage
from .columns import column_of
from .context import Context
from .offload import may_offload, offloaded
from .partition.closest import closest_partition
from .partition.diagnosis import explain, unsupported
from .partition.fitting import Needs, find_fitting
from .partition.from_graph import state_problem
from .partition.prepare import stage_counts, state
from .partition.problem import StageProblem
from .partition.search import SearchLimits, Solution, Tables, search
from .partition.statement import Statement
from .pinned import mesh_is_open
from .recompute import choose_recompute

__all__ = ["PartitionStages"]


@dataclass(frozen=True, slots=True)
class PartitionStages:
    """Pass: fills `plan.stages` and `plan.certificate`."""

    name: str = "stages"

    def run(self, plan: Plan, context: Context) -> Plan:
        if context.options.offload == "optimizer" and plan.mode is Mode.TRAIN:
            plan = offloaded(plan, context.graph)
        try:
            return self._solved(plan, context)
        except InfeasibleError as error:
            for leaner in _leaner(plan, context):
                with contextlib.suppress(InfeasibleError):
                    return self._solved(leaner, context)
            raise error

    def _solved(self, plan: Plan, context: Context) -> Plan:
        start = time.perf_counter()
        column = column_of(plan, context)
        statement = state(column.plan, column.context)
        problem = state_problem(statement, plan.num_microbatches)
        counts = stage_counts(column.plan, column.context, len(statement.units))
        options = context.options
        limits = SearchLimits(
            tolerance=options.tolerance,
            time_limit=options.time_limit_seconds,
            seed=options.seed,
        )
        context.progress(
            f"partition {len(statement.graph.nodes)} nodes in {len(statement.units)} units"
        )
        fit = None
        error = unsupported(statement, problem)
        if error is None:
            tables = Tables.of(problem, limits)
            fit = find_fitting(
                statement, problem, counts, lambda other: search(other, counts, limits, tables)
            )
        if fit is None:
            raise error or _infeasible(statement, problem, counts)
        space = (
            f"all monotone partitions of {len(statement.units)} units "
            f"({len(statement.graph.nodes)} nodes) into {_range(counts)} stages on any devices "
            f"whose additive bound of memory is at most {fit.share:.4g} of the device's"
        )
        certificate = _certificate(fit.solution, space, time.perf_counter() - start)
        if plan.certificate is not None:
            certificate = _joined(plan.certificate, certificate)
        stages = column.spread(fit.stages, context.graph)
        return replace(plan, stages=stages, mesh=_mesh(plan, stages), certificate=certificate)


def _leaner(plan: Plan, context: Context) -> Iterator[Plan]:
    """Plans that save more memory than `plan`, where no search of meshes has tried such."""
    graph, options = context.graph, context.options
    if mesh_is_open(plan.cluster, options) or plan.mode is not Mode.TRAIN:
        return
    kinds = ("selective", "full") if options.recompute == "auto" else ()
    again = [replace(plan, recomputed=choose_recompute(graph, kind)) for kind in kinds]
    yield from again
    if may_offload(plan, options) and not plan.is_offloaded:
        yield from (offloaded(entry, graph) for entry in (plan, *again))


def _mesh(plan: Plan, stages: tuple[Stage, ...]) -> Mesh:
    """The mesh with as many stages as there are."""
    if plan.mesh.axes and plan.mesh.axis(PIPELINE).size == len(stages):
        return plan.mesh
    return Mesh((MeshAxis(PIPELINE, len(stages)),)) if len(stages) > 1 else Mesh(())


def _joined(meshes: Certificate, stages: Certificate) -> Certificate:
    """The certificate of stages found within a choice of meshes."""
    bound = min(meshes.lower_bound, stages.objective)
    gap = max(0.0, 1.0 - bound / stages.objective) if stages.objective else 0.0
    return replace(
        stages,
        lower_bound=bound,
        gap=gap,
        search_space=f"{meshes.search_space}; {stages.search_space}",
    )


def _infeasible(
    statement: Statement, problem: StageProblem, counts: tuple[int, ...]
) -> InfeasibleError:
    closest, _ = closest_partition(problem, counts)
    needs = Needs.of(statement, problem).by_liveness(closest)
    return explain(statement, problem, counts, closest, needs)


def _certificate(solution: Solution, space: str, seconds: float) -> Certificate:
    gap = max(0.0, 1.0 - solution.lower_bound / solution.seconds) if solution.seconds else 0.0
    return Certificate(
        objective=solution.seconds,
        lower_bound=solution.lower_bound,
        gap=gap,
        search_space=space,
        solver=f"{' + '.join(solution.methods)}, OR-Tools {importlib.metadata.version('ortools')}",
        solver_seconds=seconds,
    )


def _range(counts: tuple[int, ...]) -> str:
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
