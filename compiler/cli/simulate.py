"""`cutset simulate`: what a plan should take, by discrete events."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..words import bytes_text
from .command import Command, add_model_arguments
from .console import Console

if TYPE_CHECKING:
    from ...cost_models import Simulation
    from ..ir.plan import MemoryPrediction, Plan

__all__ = ["COMMAND"]


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("plan", type=Path, metavar="PLAN")
    parser.add_argument(
        "--model",
        metavar="FILE.py:FACTORY",
        help="the model it was made for: simulate its programs, communication included",
    )
    parser.add_argument(
        "--trace", type=Path, metavar="FILE", help="write the step for chrome://tracing or Perfetto"
    )
    add_model_arguments(parser)


def _run(options: argparse.Namespace, console: Console) -> None:
    from ...cost_models import render_timeline, simulate
    from ..explain_memory import peak_text
    from ..files import check_target
    from ..plan_json import load_plan
    from .planned import planned_from

    if options.trace is not None:
        check_target(options.trace, "trace")
    plan = load_plan(options.plan)
    if options.model:
        planned = planned_from(options, plan, console)
        simulation = simulate(planned.programs, cluster=plan.cluster, optimizer=plan.optimizer)
        peaks = simulation.peak_memory_bytes
    else:
        simulation, peaks = _from_plan_alone(plan)
    ranks = simulation.ranks
    if options.trace is not None:
        from ..chrome_trace import chrome_trace, write_chrome_trace

        trace = chrome_trace(simulation.events, simulation.memory_curves, title="simulated")
        write_chrome_trace(options.trace, trace)
        console.note(f"wrote {options.trace}")
    data = {
        "step_seconds": simulation.step_seconds,
        "bubble_fraction": simulation.bubble_fraction,
        "busy_fraction": list(simulation.busy_fraction),
        "ranks": [{**asdict(entry), "hidden_seconds": entry.hidden_seconds} for entry in ranks],
        "peak_memory_bytes": list(peaks),
        "peaks": [{**asdict(peak), "total_bytes": peak.total_bytes} for peak in simulation.peaks],
        "link_bytes": [
            {"source": source, "target": target, "num_bytes": num_bytes}
            for (source, target), num_bytes in simulation.link_bytes
        ],
        "counts_communication": bool(options.model),
        "predicted_step_seconds": plan.prediction.step_seconds if plan.prediction else None,
    }
    bounds = {entry.device: entry.total_bytes for entry in _memory(plan)}
    told = [peak_text(peak, bounds.get(peak.rank)) for peak in simulation.peaks]
    console.result(data, f"{render_timeline(simulation)}\n{_figures(simulation, data, told)}")


def _memory(plan: Plan) -> tuple[MemoryPrediction, ...]:
    return plan.prediction.memory if plan.prediction else ()


def _from_plan_alone(plan: Plan) -> tuple[Simulation, tuple[int, ...]]:
    """The schedule at the plan's own stage times, and the memory that the plan predicts."""
    from ..ir.errors import UsageError
    from ..ir.graph import Mode
    from ..ir.stage_edges import schedule_edges
    from ..timeline import ideal_simulation

    found = plan.prediction
    if (
        plan.schedule is None
        or found is None
        or not found.stage_forward_seconds
        or (plan.mode is Mode.TRAIN and not found.stage_backward_seconds)
    ):
        raise UsageError(
            "the plan has no schedule or no predicted stage times",
            ways_out=("add --model FILE.py:FACTORY", "plan the model again"),
        )
    simulation = ideal_simulation(
        plan.schedule,
        found.stage_forward_seconds,
        found.stage_backward_seconds,
        edges=schedule_edges(plan, None),
    )
    return simulation, tuple(entry.total_bytes for entry in found.memory)


def _figures(simulation: Simulation, data: dict[str, Any], peaks: list[str]) -> str:
    lines = [
        f"step {simulation.step_seconds:.4g} s; ranks do not compute for "
        f"{simulation.bubble_fraction:.1%} of it"
    ]
    lines.extend(_seconds_table(simulation))
    lines += peaks or [
        f"rank {rank}: peak memory {bytes_text(peak)}"
        for rank, peak in enumerate(data["peak_memory_bytes"])
    ]
    lines.extend(
        f"link {link['source']} -> {link['target']}: {bytes_text(round(link['num_bytes']))} a step"
        for link in data["link_bytes"]
    )
    if not data["counts_communication"]:
        lines.append("(stage times alone; add --model to count communication and the optimizer)")
    return "\n".join(lines)


def _seconds_table(simulation: Simulation) -> list[str]:
    """Shares of the step; see `cost_models/simulation.py` for what is counted where."""
    if not simulation.ranks or not simulation.step_seconds:
        return []
    lines = [
        "rank  computes   exposed      host      idle | communicates    hidden  gradients  exposed"
        "  optimizer"
    ]
    for entry in simulation.ranks:
        shares = [
            seconds / simulation.step_seconds
            for seconds in (
                entry.busy_seconds,
                entry.exposed_seconds,
                entry.host_seconds,
                entry.idle_seconds,
                entry.communication_seconds,
                entry.hidden_seconds,
                entry.sync_seconds,
                entry.exposed_sync_seconds,
                entry.optimizer_seconds,
            )
        ]
        first = "".join(f"{share:>9.1%} " for share in shares[:4])
        widths = (12, 9, 10, 8, 10)
        second = " ".join(
            f"{share:>{width}.1%}" for share, width in zip(shares[4:], widths, strict=True)
        )
        lines.append(f"{entry.rank:>4} {first}| {second}".rstrip())
    return lines


COMMAND = Command(
    name="simulate",
    summary="step time, idle share and memory of a plan, without running it",
    examples=(
        "cutset simulate plan.json",
        "cutset simulate plan.json --model model.py:build --json",
        "cutset simulate plan.json --model model.py:build --trace simulated.json",
    ),
    configure=_configure,
    run=_run,
)
