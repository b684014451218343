"""`cutset explain`: a plan file in words and pictures."""

from __future__ import annotations

import argparse
from pathlib import Path

from .command import Command, add_model_arguments
from .console import Console

__all__ = ["COMMAND"]


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("plan", type=Path, metavar="PLAN")
    parser.add_argument(
        "--model",
        metavar="FILE.py:FACTORY",
        help="the model it was made for: adds modules, what crosses between stages, and memory",
    )
    add_model_arguments(parser)


def _run(options: argparse.Namespace, console: Console) -> None:
    from ..explain import explain, explain_json
    from ..plan_json import load_plan
    from .planned import planned_from

    plan = load_plan(options.plan)
    if not options.model:
        console.result(explain_json(plan), explain(plan))
        return
    planned = planned_from(options, plan, console)
    known = (plan, planned.captured.graph, planned.programs)
    console.result(explain_json(*known), explain(*known))


COMMAND = Command(
    name="explain",
    summary="show the stages, schedule, predicted figures and certificate of a plan",
    examples=(
        "cutset explain plan.json",
        "cutset explain plan.json --model model.py:build",
        "cutset explain plan.json --json",
    ),
    configure=_configure,
    run=_run,
)
