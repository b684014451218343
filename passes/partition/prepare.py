"""From a plan and its graph to the statement of the stage problem: schedule, units, replicas."""

from __future__ import annotations

from ...compiler.ir.errors import UsageError
from ...compiler.ir.graph import Mode
from ...compiler.ir.plan import Plan
from ...cost_models.analysis import batch_rows
from ...cost_models.memory_tables import rerun_nodes
from ...cost_models.ops import price_once
from ..coarsen import Coarsening, coarsen
from ..context import Context
from ..replicate import needed_replicas, replicated_nodes
from .pins import node_labels, together_nodes
from .statement import Statement

__all__ = ["schedule_name", "stage_counts", "state"]

_FEW_UNITS = 150
_UNITS_PER_STAGE = 6
_UNITS_TIMES_STAGES = 1200


def schedule_name(plan: Plan, context: Context) -> str:
    """1F1B unless asked otherwise: as fast as GPipe and never more in flight."""
    if plan.mode is Mode.INFER:
        return "forward"
    return context.options.schedule or "1f1b"


def stage_counts(plan: Plan, context: Context, num_units: int) -> tuple[int, ...]:
    """Numbers of stages that may be chosen.

    Raises:
        UsageError: more stages are asked for than there are devices or units.
    """
    pinned = context.options.num_stages
    least = pinned or 1 + max((stage for _, stage in context.options.pins), default=0)
    most = min(len(plan.cluster.devices), num_units)
    if not 1 <= least <= most:
        raise UsageError(
            f"{least} stages wanted of {len(plan.cluster.devices)} devices and {num_units} "
            "separable parts of the model",
            ways_out=(f"ask for 1 to {most} stages",),
        )
    return (least,) if pinned else tuple(range(least, most + 1))


def state(plan: Plan, context: Context) -> Statement:
    """What `state_problem` needs, at any number of microbatches.

    Units are made for the microbatches of `plan` if it has their number, else for the graph's own
    size.
    """
    graph, options = context.graph, context.options
    replicated = replicated_nodes(graph)
    rows = plan.batch_size / (plan.num_microbatches or plan.batch_size / batch_rows(graph))
    costs = price_once(
        graph,
        plan.cluster.types[0],
        batch_fraction=rows / batch_rows(graph),
        network=context.network,
        ahead=True,
    )
    most = options.num_stages or len(plan.cluster.devices)
    fine = min(_FEW_UNITS, _UNITS_TIMES_STAGES // most)
    how = Coarsening(
        seconds=[cost.total_seconds for cost in costs],
        num_stages=most,
        max_units=max(_UNITS_PER_STAGE * most, fine),
        labels=node_labels(graph, options.pins, options.device_pins),
        together=(*together_nodes(graph, options.together), *context.bound),
    )
    units = coarsen(graph, [node.id for node in graph.nodes if node.id not in replicated], how)
    return Statement(
        graph=graph,
        units=units,
        replicas=tuple(needed_replicas(graph, replicated, unit) for unit in units),
        cluster=plan.cluster,
        batch_size=plan.batch_size,
        optimizer=plan.optimizer,
        schedule=schedule_name(plan, context),
        memory_limit_bytes=options.memory_limit_bytes,
        pins=options.pins,
        device_pins=options.device_pins,
        recomputed=plan.recomputed,
        rerun=rerun_nodes(graph, plan.recomputed),
        network=context.network,
        parameters=context.parameters,
    )
