"""What a person is told about the mesh of a plan: which devices form what, what else was priced."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import Any

from ..cost_models.stages import optimizer_seconds
from .ir.plan import Alternative, Plan
from .ir.text import format_ranges
from .words import bytes_text, plural, seconds_text

__all__ = [
    "alternatives_json",
    "alternatives_text",
    "constraint",
    "layouts_json",
    "mesh_json",
    "mesh_text",
    "offload_json",
    "offload_text",
]

_COLUMNS = 16  # drawn of a mesh
_STAGES = 16
_NEARLY_FULL = 0.9


def columns(plan: Plan) -> tuple[tuple[dict[str, int], tuple[int, ...]], ...]:
    """For each column its place on the in-stage axes, and its device in every stage."""
    axes = plan.stage_mesh.axes
    table = []
    for number in range(plan.stage_mesh.size):
        place, rest = {}, number
        for axis in reversed(axes):
            place[axis.name] = rest % axis.size
            rest //= axis.size
        ordered = {axis.name: place[axis.name] for axis in axes}
        table.append((ordered, tuple(stage.devices[number] for stage in plan.stages)))
    return tuple(table)


def mesh_json(plan: Plan) -> dict[str, object]:
    """Devices by column and stage; by stage alone where stages have meshes of their own."""
    if plan.is_mixed:
        return {
            "stages": [
                {
                    "axes": {axis.name: axis.size for axis in stage.own.mesh.axes},
                    "devices": list(stage.devices),
                }
                for stage in plan.stages
                if stage.own is not None
            ]
        }
    return {
        "axes": {axis.name: axis.size for axis in plan.mesh.axes},
        "columns": [{"place": place, "devices": list(row)} for place, row in columns(plan)],
    }


def mesh_text(plan: Plan) -> str:
    """A picture of the devices: a row a stage, a column a place on the in-stage axes."""
    if plan.is_mixed:
        return _own_meshes_text(plan)
    if plan.stage_mesh.size == 1 or not plan.stages:
        return ""
    head = f"mesh {plan.mesh} (a row is a stage, microbatches go down a column)"
    table = columns(plan)
    shown = table[:_COLUMNS]
    lines = [
        _row(axis.name, [str(place[axis.name]) for place, _ in shown])
        for axis in plan.stage_mesh.axes
    ]
    for stage in plan.stages[:_STAGES]:
        devices = [str(devices[stage.index]) for _, devices in shown]
        lines.append(_row(f"stage {stage.index}", devices, mark="|"))
    if len(plan.stages) > _STAGES:
        lines.append(f"  ... and {len(plan.stages) - _STAGES} more stages")
    if len(table) > _COLUMNS:
        lines.append(f"  ... and {len(table) - _COLUMNS} more columns")
    return "\n".join([head, *lines, f"  {_zero_text(plan)}"])


def _own_meshes_text(plan: Plan) -> str:
    """The mesh and the devices of each stage."""
    lines = [f"meshes {plan.mesh_text} (each stage has its own)"]
    for stage in plan.stages[:_STAGES]:
        view = plan.of_stage(stage)
        mesh = str(view.stage_mesh) or "one device"
        zero = f", {_zero_text(view)}" if view.zero_level else ""
        devices = format_ranges(stage.devices)
        lines.append(f"  {f'stage {stage.index}':<10}| {mesh} on {devices}{zero}")
    if len(plan.stages) > _STAGES:
        lines.append(f"  ... and {len(plan.stages) - _STAGES} more stages")
    return "\n".join(lines)


def _zero_text(plan: Plan) -> str:
    level = plan.zero_level
    parts = ("", "states", "gradients and states", "parameters, gradients and states")[level]
    return f"ZeRO-{level}" + (f" ({parts} in parts over data)" if level else "")


def offload_json(plan: Plan) -> dict[str, Any] | None:
    """What lies in the memory of hosts, and the seconds of its update; None if nothing does."""
    if not plan.is_offloaded or plan.prediction is None:
        return None
    fullest = max(plan.prediction.memory, key=lambda entry: entry.host_bytes)
    kind = plan.cluster.type_of(fullest.device)
    updated = fullest.host_bytes / (2 + plan.optimizer.state_bytes_per_parameter_byte)
    return {
        "num_parameters": sum(entry.offloaded for entry in plan.parameter_layouts),
        "device": fullest.device,
        "host_bytes": fullest.host_bytes,
        "host_limit_bytes": kind.host.memory_bytes if kind.host else None,
        "update_seconds": optimizer_seconds(
            kind, plan.optimizer, parameter_bytes=0, offloaded_bytes=updated
        ),
    }


def offload_text(plan: Plan) -> str:
    """The same in words; empty if nothing is offloaded."""
    table = offload_json(plan)
    if table is None:
        return ""
    limit = table["host_limit_bytes"]
    room = f" of {bytes_text(limit)}" if limit is not None else ""
    return (
        f"offloaded       optimizer states of {plural(table['num_parameters'], 'parameter')}: "
        f"{bytes_text(table['host_bytes'])}{room} of host memory\n"
        f"                for device {table['device']}; its update takes "
        f"{seconds_text(table['update_seconds'])} a step"
    )


def _row(label: str, cells: list[str], mark: str = " ") -> str:
    return f"  {label:<10}{mark}" + "".join(f"{cell:>4}" for cell in cells)


def layouts_json(plan: Plan) -> dict[str, object]:
    """How many parameters, other held tensors and nodes have which layout; those that are
    replicated in every respect are not in a plan, and not here. By stage where stages have meshes
    of their own."""
    if plan.is_mixed:
        return {"stages": [layouts_json(plan.of_stage(stage)) for stage in plan.stages]}
    parameters = Counter(
        (str(entry.held), str(entry.gradient), str(entry.state)) for entry in plan.parameter_layouts
    )
    held = Counter(str(entry.layout) for entry in plan.layouts)
    return {
        "axes": [axis.name for axis in plan.stage_mesh.axes],
        "parameters": [
            {"held": sides[0], "gradient": sides[1], "state": sides[2], "count": count}
            for sides, count in sorted(parameters.items())
        ],
        "held": dict(sorted(held.items())),
        "sharded_nodes": sum(len(group.nodes) for group in plan.node_layouts),
    }


def constraint(plan: Plan) -> str:
    """The constraint that keeps the plan from being faster, in words."""
    if plan.prediction is None or not plan.prediction.memory:
        return ""
    faster = [
        entry
        for entry in plan.alternatives
        if not entry.fits and entry.step_seconds < plan.objective_seconds
    ]
    if faster:
        first = min(faster, key=lambda entry: entry.step_seconds)
        return f"memory: {_named(first)} would take {seconds_text(first.step_seconds)}, too large"
    shares = {
        entry.device: entry.total_bytes / plan.cluster.type_of(entry.device).memory_bytes
        for entry in plan.prediction.memory
    }
    device = max(shares, key=lambda index: shares[index])
    if shares[device] > _NEARLY_FULL:
        return f"memory of device {device}, at {shares[device]:.0%}"
    return f"none, it is time: no device is fuller than {shares[device]:.0%}"


def alternatives_text(plan: Plan) -> str:
    """The runner-up among other meshes, and those after it."""
    if plan.prediction is None or not plan.alternatives:
        return ""
    lines = []
    for number, entry in enumerate(plan.alternatives):
        lead = "runner-up " if number == 0 else ""
        ratio = entry.step_seconds / plan.objective_seconds - 1.0
        fits = "" if entry.fits else ", does not fit"
        if plan.is_mixed and number == 0:
            fits += ", the best with one mesh for all stages"
        lines.append(
            f"{lead:<16}{_named(entry)}: {seconds_text(entry.step_seconds)} ({ratio:+.1%}){fits}"
        )
    return "\n".join(lines)


def _named(entry: Alternative) -> str:
    zero = f", ZeRO-{entry.zero}" if entry.zero else ""
    count = plural(entry.num_microbatches, "microbatch", "es")
    return f"mesh {str(entry.mesh) or 'of one device'} with {count}{zero}"


def alternatives_json(plan: Plan) -> list[dict[str, object]]:
    """`plan.alternatives` as plain data."""
    return [{**asdict(entry), "mesh": str(entry.mesh)} for entry in plan.alternatives]
