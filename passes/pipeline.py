"""The passes in order, and the manager that runs them and verifies the plan after each one."""

from __future__ import annotations

from collections.abc import Callable

from ..compiler.ir.cluster import Cluster
from ..compiler.ir.errors import VerificationError
from ..compiler.ir.fingerprint import fingerprint
from ..compiler.ir.graph import Graph
from ..compiler.ir.plan import Objective, Plan
from ..compiler.ir.verify import verify_plan
from .context import Context, Pass, PlanOptions, silent
from .mesh import ChooseMesh
from .microbatches import ChooseMicrobatches
from .place import PlaceOperators
from .predict import Predict
from .recompute import ChooseRecompute
from .schedule import BuildSchedule
from .stage_meshes import PlanStageMeshes
from .stages import PartitionStages
from .unlike import TryStageMeshes

__all__ = [
    "PASSES",
    "PLACEMENT",
    "STAGE_MESHES",
    "Context",
    "Pass",
    "PlanOptions",
    "plan_graph",
    "run_passes",
]

PASSES: tuple[Pass, ...] = (
    ChooseRecompute(),
    ChooseMesh(),
    ChooseMicrobatches(),
    PartitionStages(),
    TryStageMeshes(),
    BuildSchedule(),
    Predict(),
)


STAGE_MESHES: tuple[Pass, ...] = (PlanStageMeshes(), BuildSchedule())
"""Instead, where each stage is given a mesh of its own."""

PLACEMENT: tuple[Pass, ...] = (PlaceOperators(),)
"""Instead, where operators are placed one by one."""


def plan_graph(
    graph: Graph,
    cluster: Cluster,
    *,
    batch_size: int,
    options: PlanOptions | None = None,
    progress: Callable[[str], None] = silent,
) -> Plan:
    """Decide everything: the fastest plan for `graph` on `cluster` that was found.

    Args:
        graph: forward graph, captured at the size of one microbatch (any: costs scale with rows).
        batch_size: rows of a step.

    Raises:
        InfeasibleError: nothing fits in memory; the cause names the stage that falls short.
        UsageError: the options contradict each other or the cluster.
    """
    chosen = options or PlanOptions()
    start = Plan(
        fingerprint=fingerprint(graph, graph.name),
        cluster=cluster,
        mode=graph.mode,
        batch_size=batch_size,
        optimizer=chosen.optimizer,
    )
    passes = PASSES if chosen.objective is Objective.STEP else PLACEMENT
    if chosen.stage_meshes:
        passes = STAGE_MESHES
    return run_passes(start, Context(graph, chosen, progress), passes)


def run_passes(plan: Plan, context: Context, passes: tuple[Pass, ...] = PASSES) -> Plan:
    """Run `passes` in order; every plan between two of them is verified.

    Raises:
        VerificationError: a pass made an illegal plan; the error names the pass.
    """
    for entry in passes:
        context.progress(f"pass {entry.name}")
        plan = entry.run(plan, context)
        try:
            verify_plan(plan, context.graph)
        except VerificationError as error:
            raise VerificationError(
                f"pass {entry.name!r} made an illegal plan: {error.cause}",
                where=error.where,
                ways_out=error.ways_out,
            ) from error
    return plan
