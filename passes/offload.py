"""Decides whether optimizer states lie in the memory of the host (ZeRO-Offload; Ren et al., 2021).

Two transfers of what is updated and an update at the host's pace are slow, so it is the last
resort: only where no plan was found that fits without. Then all states go, as each is read once a
step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ..compiler.ir.cluster import Cluster
from ..compiler.ir.graph import Graph, Mode, ValueKind
from ..compiler.ir.mesh import Layout, Replicate
from ..compiler.ir.plan import OptimizerModel, ParameterLayout, Plan
from ..cost_models.parameters import ParameterFigures
from .context import PlanOptions

__all__ = ["OFFLOADS", "have_hosts", "may_offload", "offloaded", "offloaded_figures"]

OFFLOADS = ("auto", "none", "optimizer")


def have_hosts(cluster: Cluster) -> bool:
    """Whether every device has a host to offload to."""
    return all(cluster.type_of(device.index).host is not None for device in cluster.devices)


def may_offload(plan: Plan, options: PlanOptions) -> bool:
    """Whether states may be offloaded where nothing else fits."""
    return (
        options.offload != "none"
        and plan.mode is Mode.TRAIN
        and plan.optimizer.state_bytes_per_parameter_byte > 0
        and have_hosts(plan.cluster)
    )


def offloaded(plan: Plan, graph: Graph) -> Plan:
    """`plan` with the states of all trained parameters in the memory of the host."""
    whole = Layout((Replicate(),) * len(plan.stage_mesh.axes))
    known = {entry.value: entry for entry in plan.parameter_layouts}
    entries = []
    for value in graph.values_of(ValueKind.PARAMETER):
        entry = known.get(value.name)
        if value.requires_grad:
            entry = entry or ParameterLayout(value.name, whole, whole, whole)
            entry = replace(entry, offloaded=True)
        if entry is not None:
            entries.append(entry)
    return replace(plan, parameter_layouts=tuple(entries))


def offloaded_figures(
    graph: Graph,
    figures: Mapping[int, ParameterFigures],
    optimizer: OptimizerModel,
) -> Mapping[int, ParameterFigures]:
    """Figures of the trained parameters of `graph` with all states on the host."""
    table = {}
    for value in graph.values_of(ValueKind.PARAMETER):
        if value.requires_grad:
            size = value.type.num_bytes
            states = round(size * optimizer.state_bytes_per_parameter_byte)
            entry = figures.get(value.id) or ParameterFigures(size, states, size)
            if not entry.is_offloaded:
                host = entry.state_bytes + 2 * entry.updated_bytes
                entry = replace(entry, state_bytes=0, host_bytes=host)
            table[value.id] = entry
    return table
