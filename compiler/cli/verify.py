"""`cutset verify`: prove that a plan is safe to run, and with its model that it is right."""

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
        help="the model it was made for: also verify its programs, and compare numbers",
    )
    add_model_arguments(parser)


def _run(options: argparse.Namespace, console: Console) -> None:
    from ..ir.verify import verify_plan
    from ..plan_json import load_plan
    from .planned import planned_from

    plan = load_plan(options.plan)
    verify_plan(plan)
    checks = ["plan file", "plan"]
    errors = None
    if options.model:
        from ..validate import verify_numerically

        planned = planned_from(options, plan, console)
        checks += ["model and cluster", "programs"]
        console.progress("compare outputs and gradients with the model's own")
        errors = verify_numerically(planned)
        checks.append("numbers")
    console.result(
        {"ok": True, "checks": checks, "max_relative_error": errors},
        f"{options.plan}: all right ({', '.join(checks)})",
    )


COMMAND = Command(
    name="verify",
    summary="check a plan file, and with its model the programs and their numbers",
    examples=(
        "cutset verify plan.json",
        "cutset verify plan.json --model model.py:build --json",
    ),
    configure=_configure,
    run=_run,
)
