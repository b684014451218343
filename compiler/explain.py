"""A plan as a person reads it, and the same as JSON.

From a plan, and the graph it was made for where there is one, to: the stages with their modules,
memory and times, the schedule as a timeline, the predicted figures, what binds, the certificate
and the warnings. Without the graph (a plan file alone) modules and boundaries are not known.
"""

from __future__ import annotations

import statistics
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from ..cost_models.simulator import Simulation
from ..cost_models.timeline import render_timeline
from .explain_blocks import blocks_text, summarize_blocks
from .explain_memory import peaks_json, peaks_text
from .explain_mesh import (
    alternatives_json,
    alternatives_text,
    constraint,
    layouts_json,
    mesh_json,
    mesh_text,
    offload_json,
    offload_text,
)
from .explain_placement import busiest, placement_json, placement_text
from .explain_profile import profile_json, profile_text
from .ir.graph import Graph, ValueKind, producers, users
from .ir.plan import MemoryPrediction, Objective, Plan, Stage
from .ir.program import Program
from .ir.stage_edges import schedule_edges
from .module_names import modules_of_stages
from .timeline import ideal_simulation
from .words import bytes_text, count_text, plural, seconds_text

__all__ = ["Boundary", "StageSummary", "binding", "explain", "explain_json", "summarize"]

_BOXES = 8  # more stages than this are listed one a line
_CELLS_PER_ACTION = 1.5  # columns that a typical action of a drawn schedule has
_LANES = 16  # ranks drawn of a schedule
_MODULE_LINES = 3  # lines of module names in a box
_WIDTH = 76
_NEARLY_FULL = 0.9
_NOTABLE = 0.03  # difference of two predictions that is told


@dataclass(frozen=True, slots=True)
class Boundary:
    """Values that one microbatch carries from one stage to another."""

    source: int
    target: int
    values: tuple[str, ...]
    num_bytes: int


@dataclass(frozen=True, slots=True)
class StageSummary:
    """What is shown of one stage; figures that are not known are None."""

    index: int
    device: int
    device_name: str
    modules: tuple[str, ...]
    num_nodes: int
    num_parameters: int | None
    forward_seconds: float | None
    backward_seconds: float | None
    memory: MemoryPrediction | None
    memory_limit_bytes: int


def summarize(plan: Plan, graph: Graph | None = None) -> tuple[StageSummary, ...]:
    """One summary a stage."""
    modules = modules_of_stages(graph, plan.stages) if graph else ((),) * len(plan.stages)
    prediction = plan.prediction
    memory = {entry.device: entry for entry in prediction.memory} if prediction else {}
    forward = prediction.stage_forward_seconds if prediction else ()
    backward = prediction.stage_backward_seconds if prediction else ()
    summaries = []
    for stage in plan.stages:
        device = plan.cluster.devices[stage.device]
        summaries.append(
            StageSummary(
                index=stage.index,
                device=stage.device,
                device_name=f"{device.type} on {device.node}",
                modules=modules[stage.index],
                num_nodes=len(stage.nodes),
                num_parameters=_num_parameters(graph, stage) if graph else None,
                forward_seconds=_entry(forward, stage),
                backward_seconds=_entry(backward, stage),
                memory=memory.get(stage.device),
                memory_limit_bytes=plan.cluster.type_of(stage.device).memory_bytes,
            )
        )
    return tuple(summaries)


def _entry(times: tuple[float, ...], stage: Stage) -> float | None:
    return times[stage.index] if stage.index < len(times) else None


def _num_parameters(graph: Graph, stage: Stage) -> int:
    held = {value for node in stage.nodes for value in graph.nodes[node].inputs}
    return sum(
        value.type.numel for value in graph.values_of(ValueKind.PARAMETER) if value.id in held
    )


def boundaries(plan: Plan, graph: Graph) -> tuple[Boundary, ...]:
    """What crosses between stages, by source, then target. Nodes held by several stages send
    nothing."""
    homes: dict[int, list[int]] = {}
    for stage in plan.stages:
        for node in stage.nodes:
            homes.setdefault(node, []).append(stage.index)
    readers = users(graph)
    crossing: dict[tuple[int, int], list[int]] = {}
    for value, producer in sorted(producers(graph).items()):
        held = homes.get(producer, [])
        targets = {stage for user in readers[value] for stage in homes.get(user, [])}
        for target in sorted(targets - set(held)):
            if held:
                crossing.setdefault((held[0], target), []).append(value)
    return tuple(
        Boundary(
            source,
            target,
            tuple(graph.values[value].name for value in values),
            sum(graph.values[value].type.num_bytes for value in values),
        )
        for (source, target), values in sorted(crossing.items())
    )


def binding(plan: Plan) -> tuple[str, ...]:
    """Sentences that say what keeps the plan from being faster."""
    prediction = plan.prediction
    if prediction is None:
        return ()
    pairs = zip(prediction.stage_forward_seconds, prediction.stage_backward_seconds, strict=True)
    times = [forward + backward for forward, backward in pairs]
    sentences = []
    load = busiest(plan)
    if load is not None:
        sentences.append(
            f"the busiest device is {load.device}: {seconds_text(load.total_seconds)} a microbatch"
        )
    elif times:
        worst = max(range(len(times)), key=times.__getitem__)
        share = times[worst] * len(times) / sum(times) if sum(times) else 1.0
        sentences.append(
            f"the slowest stage is {worst}: {seconds_text(times[worst])} a microbatch, "
            f"{share:.2f} times the mean"
        )
    if prediction.memory:
        fullest = max(prediction.memory, key=lambda entry: _fullness(plan, entry))
        limit = plan.cluster.type_of(fullest.device).memory_bytes
        verb = "is close to its limit" if _fullness(plan, fullest) > _NEARLY_FULL else "has room"
        sentences.append(
            f"memory {verb}: the fullest device is {fullest.device} with "
            f"{bytes_text(fullest.total_bytes)} of {bytes_text(limit)} "
            f"({_fullness(plan, fullest):.0%})"
        )
    sentences.append(
        f"the pipeline is idle {prediction.bubble_fraction:.0%} of the time with "
        f"{plural(plan.num_microbatches, 'microbatch', 'es')}"
    )
    return tuple(sentences)


def _fullness(plan: Plan, entry: MemoryPrediction) -> float:
    return entry.total_bytes / plan.cluster.type_of(entry.device).memory_bytes


def explain_json(
    plan: Plan, graph: Graph | None = None, programs: Sequence[Program] = ()
) -> dict[str, object]:
    """Everything that `explain` shows, as plain data."""
    prediction = plan.prediction
    return {
        "model": asdict(plan.fingerprint),
        "mode": plan.mode.value,
        "batch_size": plan.batch_size,
        "num_microbatches": plan.num_microbatches,
        "optimizer": plan.optimizer.name,
        "cluster": {"name": plan.cluster.name, "num_devices": len(plan.cluster.devices)},
        "mesh": plan.mesh_text,
        "devices": mesh_json(plan),
        "objective": plan.objective.value,
        "placement": placement_json(plan, graph),
        "zero": plan.zero_level,
        "layouts": layouts_json(plan),
        "offload": offload_json(plan),
        "stages": [_stage_json(summary) for summary in summarize(plan, graph)],
        "boundaries": [asdict(item) for item in boundaries(plan, graph)] if graph else None,
        "schedule": str(plan.schedule) if plan.schedule else None,
        "step_seconds": prediction.step_seconds if prediction else None,
        "bubble_fraction": prediction.bubble_fraction if prediction else None,
        "objective_seconds": plan.objective_seconds,
        "peaks": peaks_json(plan, programs),
        "binding": list(binding(plan)),
        "constraint": constraint(plan),
        "blocks": [asdict(block) for block in summarize_blocks(plan, graph)] if graph else None,
        "alternatives": alternatives_json(plan),
        "profile": profile_json(plan),
        "certificate": asdict(plan.certificate) if plan.certificate else None,
        "warnings": list(plan.warnings),
    }


def _stage_json(summary: StageSummary) -> dict[str, object]:
    entry = asdict(summary)
    if summary.memory is not None:
        entry["memory"]["total_bytes"] = summary.memory.total_bytes
    return entry


def explain(plan: Plan, graph: Graph | None = None, programs: Sequence[Program] = ()) -> str:
    """The plan in words and pictures, in plain ASCII, some 80 columns wide.

    Args:
        programs: of the plan; with them, what each rank holds at its fullest is told.
    """
    blocks = summarize_blocks(plan, graph) if graph is not None else ()
    seconds = plan.objective_seconds
    told = blocks_text(blocks, seconds)
    placed = plan.objective is not Objective.STEP
    parts = [
        _head(plan),
        mesh_text(plan),
        placement_text(plan, graph) if placed else _stages_text(plan, graph),
        told,
    ]
    if plan.schedule is not None:
        parts.append(_schedule_text(plan, graph))
    parts += [peaks_text(plan, programs), _figures_text(plan), profile_text(plan)]
    if plan.warnings:
        parts.append("warnings\n" + "\n".join(f"  - {line}" for line in plan.warnings))
    return "\n\n".join(part for part in parts if part) + "\n"


def _head(plan: Plan) -> str:
    model = plan.fingerprint
    kinds = Counter(device.type for device in plan.cluster.devices)
    devices = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
    work = f"training with {plan.optimizer.name}" if plan.mode.value == "train" else "inference"
    return (
        f"{model.name}: {count_text(model.num_parameters)} parameters "
        f"({bytes_text(model.parameter_bytes)}), {work}, batch of {plan.batch_size} in "
        f"{plural(plan.num_microbatches, 'microbatch', 'es')}\n"
        f"on {plan.cluster.name}: {devices}; {plural(len(plan.stages), 'stage', 's')}"
    )


def _stages_text(plan: Plan, graph: Graph | None) -> str:
    summaries = summarize(plan, graph)
    if len(summaries) > _BOXES:
        return "stages\n" + "\n".join(f"  {_stage_line(item)}" for item in summaries)
    sent = boundaries(plan, graph) if graph else ()
    lines: list[str] = []
    for summary in summaries:
        lines.extend(_box(summary))
        lines.extend(_arrows(summary.index, sent, last=summary.index + 1 == len(summaries)))
    return "\n".join(lines)


def _box(summary: StageSummary) -> list[str]:
    title = f"- stage {summary.index} on device {summary.device} ({summary.device_name}) "
    inner = _WIDTH - 4
    modules = ", ".join(summary.modules)
    body = textwrap.wrap(modules, inner, max_lines=_MODULE_LINES, placeholder=" ...")
    body.append(_work_text(summary))
    if summary.memory is not None:
        body.append(_memory_bar(summary.memory.total_bytes, summary.memory_limit_bytes))
    rows = [f"| {_clip(line, inner):<{inner}} |" for line in body]
    return [f"+{title[: _WIDTH - 2]:-<{_WIDTH - 2}}+", *rows, f"+{'-' * (_WIDTH - 2)}+"]


def _stage_line(summary: StageSummary) -> str:
    used = summary.memory.total_bytes / summary.memory_limit_bytes if summary.memory else None
    memory = f"memory {used:4.0%}" if used is not None else ""
    modules = _clip(", ".join(summary.modules), 40)
    return (
        f"{summary.index:>3} device {summary.device:<3} {_times(summary):<34} {memory}  {modules}"
    ).rstrip()


def _work_text(summary: StageSummary) -> str:
    parts = [f"{summary.num_nodes} ops"]
    if summary.num_parameters is not None:
        parts.append(f"{count_text(summary.num_parameters)} parameters")
    return "   ".join([*parts, *filter(None, [_times(summary)])])


def _times(summary: StageSummary) -> str:
    parts = []
    if summary.forward_seconds is not None:
        parts.append(f"forward {seconds_text(summary.forward_seconds)}")
    if summary.backward_seconds:
        parts.append(f"backward {seconds_text(summary.backward_seconds)}")
    return "   ".join(parts)


def _memory_bar(used: int, limit: int) -> str:
    cells = 30
    filled = min(cells, round(used / limit * cells)) if limit else cells
    bar = "#" * filled + "." * (cells - filled)
    return f"memory [{bar}] {bytes_text(used)} of {bytes_text(limit)} ({used / limit:.0%})"


def _arrows(stage: int, sent: tuple[Boundary, ...], *, last: bool) -> list[str]:
    if last:
        return []
    notes = [
        f"{bytes_text(item.num_bytes)} to stage {item.target}"
        for item in sent
        if item.source == stage
    ]
    note = f"  {'; '.join(notes)} a microbatch" if notes else ""
    return [f"    |{_clip(note, _WIDTH - 6)}", "    v"]


def _schedule_text(plan: Plan, graph: Graph | None) -> str:
    assert plan.schedule is not None
    if plan.prediction is None:
        return str(plan.schedule)
    simulation = ideal_simulation(
        plan.schedule,
        plan.prediction.stage_forward_seconds,
        plan.prediction.stage_backward_seconds,
        edges=schedule_edges(plan, graph),
    )
    shown = _beginning(simulation, cells=_WIDTH - 20)
    lanes = render_timeline(shown, _WIDTH - 20).splitlines()[1:]
    if len(lanes) > _LANES:
        lanes = [*lanes[:_LANES], f"... and {len(lanes) - _LANES} more ranks"]
    head = (
        f"schedule {plan.schedule.name}: {seconds_text(simulation.step_seconds)} by stage times "
        "alone"
    )
    if shown.step_seconds < simulation.step_seconds:
        head += f"; the first {seconds_text(shown.step_seconds)}:"
    return "\n".join([head, "(0-9 forward, a-z backward, A-Z weight gradient, . idle)", *lanes])


def _beginning(simulation: Simulation, cells: int) -> Simulation:
    """As much of a step as `cells` can show with more than a cell for a typical action."""
    lengths = [span.end_seconds - span.begin_seconds for span in simulation.timeline]
    typical = statistics.median(lengths) if lengths else 0.0
    limit = min(simulation.step_seconds, cells * typical / _CELLS_PER_ACTION)
    spans = tuple(
        replace(span, end_seconds=min(span.end_seconds, limit))
        for span in simulation.timeline
        if span.begin_seconds < limit
    )
    return replace(simulation, step_seconds=limit, timeline=spans)


def _figures_text(plan: Plan) -> str:
    lines = []
    if plan.prediction is not None:
        seconds = plan.prediction.step_seconds
        rate = plan.batch_size / seconds if seconds > 0 else 0.0
        lines.append(f"predicted step  {seconds_text(seconds)}, {rate:.3g} rows a second")
        planned = plan.objective_seconds
        if seconds and abs(planned / seconds - 1.0) > _NOTABLE:
            lines.append(
                f"                simulated; the formula that planning minimises gives "
                f"{seconds_text(planned)} ({planned / seconds - 1.0:+.1%})"
            )
    lines.extend(f"what binds      {sentence}" for sentence in binding(plan))
    if constraint(plan):
        lines.append(f"constraint      {constraint(plan)}")
    if plan.is_offloaded:
        lines.append(offload_text(plan))
    if plan.alternatives:
        lines.append(alternatives_text(plan))
    if plan.certificate is not None:
        proof = plan.certificate
        lines.append(
            f"certificate     objective {seconds_text(proof.objective)}, nothing below "
            f"{seconds_text(proof.lower_bound)} (gap {proof.gap:.2%})"
        )
        lines.append(f"                searched: {proof.search_space}")
        lines.append(f"                by {proof.solver} in {proof.solver_seconds:.2f} s")
    return "\n".join(lines)


def _clip(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 3]}..."
