"""`cutset simulate`: what a plan should take, by discrete events."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .command import Command, add_model_arguments
from .console import Console

if TYPE_CHECKING:
    from ...cost_models import Simulation
    from ..ir.plan import Plan

__all__ = ["COMMAND"]

_MIB = 1 << 20


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
    from ..plan_json import load_plan
    from .planned import planned_from

    plan = load_plan(options.plan)
    if options.model:
        planned = planned_from(options, plan, console)
        simulation = simulate(planned.programs, cluster=plan.cluster, optimizer=plan.optimizer)
        peaks = simulation.peak_memory_bytes
    else:
        simulation, peaks = _from_plan_alone(plan)
    if options.trace is not None:
        from ..chrome_trace import chrome_trace, write_chrome_trace

        trace = chrome_trace(simulation.events, simulation.memory_curves, title="simulated")
        write_chrome_trace(options.trace, trace)
    data = {
        "step_seconds": simulation.step_seconds,
        "bubble_fraction": simulation.bubble_fraction,
        "busy_fraction": list(simulation.busy_fraction),
        "peak_memory_bytes": list(peaks),
        "link_bytes": [
            {"source": source, "target": target, "num_bytes": num_bytes}
            for (source, target), num_bytes in simulation.link_bytes
        ],
        "counts_communication": bool(options.model),
        "predicted_step_seconds": plan.prediction.step_seconds if plan.prediction else None,
    }
    console.result(data, f"{render_timeline(simulation)}\n{_figures(data)}")


def _from_plan_alone(plan: Plan) -> tuple[Simulation, tuple[int, ...]]:
    """The schedule at the plan's own stage times, and the memory that the plan predicts."""
    from ..ir.errors import UsageError
    from ..ir.stage_edges import schedule_edges
    from ..timeline import ideal_simulation

    if plan.schedule is None or plan.prediction is None:
        raise UsageError(
            "the plan has no schedule or no predicted stage times",
            ways_out=("add --model FILE.py:FACTORY", "plan the model again"),
        )
    simulation = ideal_simulation(
        plan.schedule,
        plan.prediction.stage_forward_seconds,
        plan.prediction.stage_backward_seconds,
        edges=schedule_edges(plan, None),
    )
    return simulation, tuple(entry.total_bytes for entry in plan.prediction.memory)


def _figures(data: dict[str, Any]) -> str:
    lines = [f"step {data['step_seconds']:.4g} s, idle {data['bubble_fraction']:.1%}"]
    lines.extend(
        f"rank {rank}: peak memory {peak / _MIB:.1f} MiB"
        for rank, peak in enumerate(data["peak_memory_bytes"])
    )
    lines.extend(
        f"link {link['source']} -> {link['target']}: {link['num_bytes'] / _MIB:.2f} MiB a step"
        for link in data["link_bytes"]
    )
    if not data["counts_communication"]:
        lines.append("(stage times alone; add --model to count communication and the optimizer)")
    return "\n".join(lines)


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
