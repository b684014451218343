"""Predicts a finished plan: step time and bubble by the planner's objective, memory by liveness."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..compiler.ir.graph import Mode
from ..compiler.ir.plan import MemoryPrediction, Plan, Prediction
from ..cost_models.analysis import batch_rows
from ..cost_models.memory import consuming_stages, stage_memory
from ..cost_models.memory_tables import memory_model, rerun_nodes
from ..cost_models.ops import price_once
from ..cost_models.recompute import with_reruns
from .columns import Column, column_of
from .context import Context
from .partition.problem import in_flight_microbatches

__all__ = ["Predict", "predict", "predict_memory"]


def predict(plan: Plan, context: Context) -> Prediction:
    """Expected figures of `plan`, whose stages, schedule and certificate are decided."""
    assert plan.schedule is not None and plan.certificate is not None
    column = column_of(plan, context)
    graph, cluster = column.context.graph, column.plan.cluster
    stages = column.narrow(plan.stages)
    fraction = column.plan.batch_size / plan.num_microbatches / batch_rows(graph)
    kinds = {cluster.type_of(stage.device) for stage in stages}
    rerun = rerun_nodes(graph, column.plan.recomputed)
    network = column.context.network
    costs = {
        kind.name: with_reruns(
            price_once(graph, kind, batch_fraction=fraction, network=network, ahead=True), rerun
        )
        for kind in kinds
    }
    forward, backward = [], []
    for stage in stages:
        prices = [costs[cluster.devices[stage.device].type][node] for node in stage.nodes]
        forward.append(sum(cost.forward_seconds for cost in prices))
        trains = plan.mode is Mode.TRAIN
        backward.append(sum(cost.backward_seconds for cost in prices) if trains else 0.0)
    seconds = plan.certificate.objective
    busy = plan.num_microbatches * (sum(forward) + sum(backward))
    bubble = 1.0 - busy / (len(plan.stages) * seconds) if seconds else 0.0
    return Prediction(
        step_seconds=seconds,
        bubble_fraction=min(max(bubble, 0.0), 1.0),
        stage_forward_seconds=tuple(forward),
        stage_backward_seconds=tuple(backward),
        memory=_memory(plan, column),
    )


def predict_memory(plan: Plan, context: Context) -> tuple[MemoryPrediction, ...]:
    """Upper bound of the memory of every device under `plan`, whose stages are decided."""
    return _memory(plan, column_of(plan, context))


def _memory(plan: Plan, column: Column) -> tuple[MemoryPrediction, ...]:
    """Memory of every device; those of one stage need the same."""
    assert plan.schedule is not None
    graph, cluster = column.context.graph, column.plan.cluster
    stages = column.narrow(plan.stages)
    fraction = column.plan.batch_size / plan.num_microbatches / batch_rows(graph)
    backends = sorted({cluster.type_of(stage.device).backend for stage in stages})
    models = {
        backend: memory_model(graph, batch_fraction=fraction, backend=backend)
        for backend in backends
    }
    consumers = consuming_stages(graph, stages)
    table = []
    for stage, whole in zip(stages, plan.stages, strict=True):
        need = stage_memory(
            models[cluster.type_of(stage.device).backend],
            stage.nodes,
            in_flight=in_flight_microbatches(
                plan.schedule.name, plan.num_microbatches, len(stages), stage.index
            ),
            optimizer=plan.optimizer,
            mode=plan.mode,
            num_microbatches=plan.num_microbatches,
            consumers=consumers,
            recomputed=column.plan.recomputed,
            parameters=column.context.parameters,
        )
        table += [replace(need, device=device) for device in whole.devices]
    return tuple(sorted(table, key=lambda entry: entry.device))


@dataclass(frozen=True, slots=True)
class Predict:
    """Pass: fills `plan.prediction`, unless stages have meshes of their own and were priced so."""

    name: str = "predict"

    def run(self, plan: Plan, context: Context) -> Plan:
        return plan if plan.is_mixed else replace(plan, prediction=predict(plan, context))
