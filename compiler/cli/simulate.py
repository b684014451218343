"""`cutset simulate`: what a plan should take, by discrete events."""

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
        help="the model it was made for: simulate its programs, communication included",
    )
    add_model_arguments(parser)


def _run(options: argparse.Namespace, console: Console) -> None:
    raise NotImplementedError


COMMAND = Command(
    name="simulate",
    summary="step time, idle share and memory of a plan, without running it",
    examples=(
        "cutset simulate plan.json",
        "cutset simulate plan.json --model model.py:build --json",
    ),
    configure=_configure,
    run=_run,
)
