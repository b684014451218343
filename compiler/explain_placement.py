"""What a person is told about operators that were placed one by one: which lie on which device, and
how long it is busy with a microbatch."""

from __future__ import annotations

import textwrap
from collections import Counter
from dataclasses import dataclass

from .ir.graph import Graph
from .ir.plan import DeviceLoad, Objective, Plan, Stage
from .ir.text import format_ranges
from .module_names import modules_of_stages
from .words import bytes_text, plural, seconds_text

__all__ = ["DeviceSummary", "busiest", "placement_json", "placement_text", "summarize_devices"]

_WIDTH = 76
_LINES = 4  # of modules, and of operators


@dataclass(frozen=True, slots=True)
class DeviceSummary:
    """One device of a plan; what is not known without the graph is empty.

    Args:
        pieces: stages that stand on it.
        nodes: ids of the nodes that it runs, ascending.
        operators: (name, how many), most first.
    """

    device: int
    device_name: str
    pieces: tuple[int, ...]
    nodes: tuple[int, ...]
    modules: tuple[str, ...]
    operators: tuple[tuple[str, int], ...]
    load: DeviceLoad | None
    memory_bytes: int | None
    memory_limit_bytes: int


def summarize_devices(plan: Plan, graph: Graph | None = None) -> tuple[DeviceSummary, ...]:
    """One summary a device, those without operators included."""
    devices = plan.cluster.devices
    nodes = {
        device.index: sorted(
            {node for stage in plan.stages if stage.device == device.index for node in stage.nodes}
        )
        for device in devices
    }
    whole = tuple(
        Stage(device.index, (device.index,), tuple(nodes[device.index])) for device in devices
    )
    modules = modules_of_stages(graph, whole) if graph is not None else ((),) * len(devices)
    prediction = plan.prediction
    loads = {load.device: load for load in prediction.loads} if prediction else {}
    memory = {need.device: need.total_bytes for need in prediction.memory} if prediction else {}
    return tuple(
        DeviceSummary(
            device=device.index,
            device_name=f"{device.type} on {device.node}",
            pieces=tuple(stage.index for stage in plan.stages if stage.device == device.index),
            nodes=tuple(nodes[device.index]),
            modules=modules[device.index],
            operators=_operators(graph, nodes[device.index]),
            load=loads.get(device.index),
            memory_bytes=memory.get(device.index),
            memory_limit_bytes=plan.cluster.type_of(device.index).memory_bytes,
        )
        for device in devices
    )


def _operators(graph: Graph | None, nodes: list[int]) -> tuple[tuple[str, int], ...]:
    if graph is None:
        return ()
    counts = Counter(graph.nodes[node].op.packet for node in nodes)
    return tuple(sorted(counts.items(), key=lambda entry: (-entry[1], entry[0])))


def busiest(plan: Plan) -> DeviceLoad | None:
    """The device with most to do for a microbatch, where operators were placed one by one."""
    loads = plan.prediction.loads if plan.prediction is not None else ()
    return max(loads, key=lambda load: load.total_seconds, default=None)


def placement_json(plan: Plan, graph: Graph | None = None) -> list[dict[str, object]] | None:
    """Devices with what they run; None where stages were cut instead."""
    if plan.objective is Objective.STEP:
        return None
    return [_device_json(summary) for summary in summarize_devices(plan, graph)]


def _device_json(summary: DeviceSummary) -> dict[str, object]:
    load = summary.load
    return {
        "device": summary.device,
        "device_name": summary.device_name,
        "pieces": list(summary.pieces),
        "nodes": format_ranges(summary.nodes),
        "modules": list(summary.modules),
        "operators": dict(summary.operators),
        "load_seconds": load.total_seconds if load else None,
        "compute_seconds": load.compute_seconds if load else None,
        "communication_seconds": load.communication_seconds if load else None,
        "memory_bytes": summary.memory_bytes,
        "memory_limit_bytes": summary.memory_limit_bytes,
    }


def placement_text(plan: Plan, graph: Graph | None = None) -> str:
    """A box a device: its load, its operators by kind and by module, its memory."""
    goal = {
        Objective.THROUGHPUT: "the busiest device has least to do in a stream of microbatches",
        Objective.LATENCY: "one sample is done soonest",
    }[plan.objective]
    head = f"objective {plan.objective.value}: {goal}"
    worst = busiest(plan)
    lines = []
    for summary in summarize_devices(plan, graph):
        is_worst = worst is not None and worst.device == summary.device
        lines += _box(summary, mark=" busiest" if is_worst else "")
    return "\n".join([head, *lines])


def _box(summary: DeviceSummary, *, mark: str) -> list[str]:
    title = f"- device {summary.device} ({summary.device_name}){mark} "
    inner = _WIDTH - 4
    body = [_load_text(summary)]
    for kind, items in (
        ("modules", summary.modules),
        ("operators", tuple(f"{count} {name}" for name, count in summary.operators)),
    ):
        if items:
            text = f"{kind}: {', '.join(items)}"
            body += textwrap.wrap(text, inner, max_lines=_LINES, placeholder=" ...")
    if summary.memory_bytes is not None:
        limit = summary.memory_limit_bytes
        share = summary.memory_bytes / limit
        body.append(
            f"memory {bytes_text(summary.memory_bytes)} of {bytes_text(limit)} ({share:.0%})"
        )
    rows = [f"| {line[:inner]:<{inner}} |" for line in body]
    return [f"+{title[: _WIDTH - 2]:-<{_WIDTH - 2}}+", *rows, f"+{'-' * (_WIDTH - 2)}+"]


def _load_text(summary: DeviceSummary) -> str:
    if not summary.nodes:
        return "nothing to do"
    work = f"{plural(len(summary.nodes), 'op')} in {plural(len(summary.pieces), 'piece')}"
    load = summary.load
    if load is None:
        return work
    return (
        f"{work}: {seconds_text(load.total_seconds)} a microbatch, of which "
        f"{seconds_text(load.communication_seconds)} to move values"
    )
