"""`cutset export`: a plan as annotated ONNX."""

from __future__ import annotations

import argparse
from pathlib import Path

from .command import Command, add_model_arguments
from .console import Console

__all__ = ["COMMAND"]


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("plan", type=Path, metavar="PLAN")
    parser.add_argument("--model", required=True, metavar="FILE.py:FACTORY")
    parser.add_argument("--onnx", required=True, type=Path, metavar="OUT.onnx")
    parser.add_argument(
        "--weights", action="store_true", help="store the contents of parameters and buffers too"
    )
    add_model_arguments(parser)


def _run(options: argparse.Namespace, console: Console) -> None:
    from ..export import to_onnx
    from ..files import check_target
    from ..ir.fingerprint import plan_hash
    from ..plan_json import load_plan
    from .planned import planned_from

    check_target(options.onnx, "ONNX")
    plan = load_plan(options.plan)
    planned = planned_from(options, plan, console)
    console.progress(f"write {options.onnx}")
    graph = planned.captured.graph
    to_onnx(
        planned.plan,
        graph,
        options.onnx,
        plan_hash=plan_hash(planned.plan),
        tensors=planned.captured.tensors if options.weights else None,
    )
    data = {
        "path": str(options.onnx),
        "num_nodes": len(graph.nodes),
        "num_stages": len(plan.stages),
        "num_bytes": options.onnx.stat().st_size,
    }
    console.result(
        data,
        f"{options.onnx}: {len(graph.nodes)} nodes in {len(plan.stages)} pipeline stages, "
        f"{data['num_bytes']} bytes",
    )


COMMAND = Command(
    name="export",
    summary="write the whole model as ONNX, every node annotated with its stage and devices",
    examples=(
        "cutset export plan.json --model model.py:build --onnx plan.onnx",
        "cutset export plan.json --model model.py:build --onnx full.onnx --weights",
    ),
    configure=_configure,
    run=_run,
)
