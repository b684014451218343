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
        help="the model it was made for: adds modules and what crosses between stages",
    )
    add_model_arguments(parser)


def _run(options: argparse.Namespace, console: Console) -> None:
    from ..explain import explain, explain_json
    from ..plan_json import load_plan
    from .planned import planned_from

    plan = load_plan(options.plan)
    graph = planned_from(options, plan, console).captured.graph if options.model else None
    console.result(explain_json(plan, graph), explain(plan, graph))


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
