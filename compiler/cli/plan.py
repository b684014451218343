"""`cutset plan`: search a plan for a model and a cluster."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .command import (
    Command,
    add_model_arguments,
    add_optimizer_arguments,
    positive_float,
    positive_int,
)
from .console import Console

__all__ = ["COMMAND", "planning_arguments"]

_GIB = 1 << 30


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="FILE.py:FACTORY", help="what to plan; also package.module:factory"
    )
    parser.add_argument(
        "--devices",
        required=True,
        metavar="N|CLUSTER",
        help="a number of local workers, a cluster file (.toml, .json), or a preset",
    )
    parser.add_argument("--mode", choices=("train", "infer"), default="train")
    parser.add_argument(
        "--objective",
        choices=("step", "throughput", "latency"),
        default="step",
        help="what is kept small; throughput and latency place single operators, for inference",
    )
    parser.add_argument(
        "--granularity",
        choices=("operator", "block"),
        default="operator",
        help="what an objective other than step places (default: operator)",
    )
    parser.add_argument(
        "--contiguous", action="store_true", help="no device runs several disconnected pieces"
    )
    parser.add_argument(
        "--profile",
        choices=("off", "blocks", "ops"),
        default="off",
        help="measure the plan's distinct blocks, or operators, on the devices here and plan again",
    )
    parser.add_argument(
        "--profile-seconds",
        type=positive_float,
        default=60.0,
        metavar="SECONDS",
        help="for measuring (default: 60)",
    )
    parser.add_argument(
        "--compile", action="store_true", help="measure for stages that will run compiled"
    )
    parser.add_argument(
        "--time-limit",
        type=positive_float,
        default=20.0,
        metavar="SECONDS",
        help="for placing operators (default: 20)",
    )
    parser.add_argument(
        "--microbatches", type=positive_int, metavar="M", help="default: chosen by the planner"
    )
    parser.add_argument("--schedule", choices=("1f1b", "gpipe"), help="default: 1f1b")
    parser.add_argument(
        "--stages", type=positive_int, metavar="S", help="default: chosen by the planner"
    )
    parser.add_argument(
        "--recompute",
        choices=("auto", "none", "full", "selective"),
        default="auto",
        help="what backward computes again instead of keeping it (default: what memory asks for)",
    )
    parser.add_argument(
        "--mesh",
        metavar="AXIS=N,...",
        help="e.g. data=2,pipeline=2,tensor=2, or one mesh for each stage, first to last: "
        "data=2,tensor=2/data=1 (default: chosen)",
    )
    parser.add_argument(
        "--zero",
        type=int,
        choices=(0, 1, 2, 3),
        help="level of ZeRO over the data axis (default: the least that fits)",
    )
    parser.add_argument(
        "--offload",
        choices=("auto", "none", "optimizer"),
        default="auto",
        help="keep optimizer states in the memory of the host (default: if nothing fits otherwise)",
    )
    parser.add_argument(
        "--memory-limit", type=gibibytes, metavar="GIB", help="memory of every device"
    )
    parser.add_argument(
        "--compare",
        metavar="NAME,...",
        help="also price hand-written strategies: ddp, fsdp, tp, pp",
    )
    parser.add_argument("-o", "--output", type=Path, metavar="PLAN", help="write the plan here")
    add_model_arguments(parser)
    add_optimizer_arguments(parser)


def gibibytes(text: str) -> int:
    """An argument in GiB, as bytes."""
    number = positive_float(text) * _GIB
    if not 1 <= number < 1 << 63:
        raise argparse.ArgumentTypeError(f"{text} GiB is not what a device has")
    return int(number)


def planning_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `plan_model` that the command line pins."""
    return {
        "mode": options.mode,
        "objective": options.objective,
        "granularity": options.granularity,
        "contiguous": options.contiguous,
        "profile": options.profile,
        "profile_seconds": options.profile_seconds,
        "compile": options.compile,
        "placement_seconds": options.time_limit,
        "num_microbatches": options.microbatches,
        "num_stages": options.stages,
        "schedule": options.schedule,
        "mesh": options.mesh,
        "zero": options.zero,
        "recompute": options.recompute,
        "offload": options.offload,
        "memory_limit_bytes": options.memory_limit,
    }


def _run(options: argparse.Namespace, console: Console) -> None:
    from ..api import compare_strategies, optimizer_model_of
    from ..compare import render_comparison, strategies_named
    from ..explain import explain, explain_json
    from ..files import check_target
    from ..plan_json import save_plan
    from .model_loader import choose_optimizer, for_inference, load_model

    if options.output is not None:
        check_target(options.output, "plan")
    strategies = () if options.compare is None else strategies_named(options.compare)
    console.progress(f"load {options.model}")
    loaded = load_model(options.model, seed=options.seed, dtype=options.dtype)
    factory = choose_optimizer(loaded, options.optimizer, options.lr)
    if options.mode == "infer":
        loaded = for_inference(loaded)
    planned, comparison = compare_strategies(
        loaded.model,
        options.devices,
        example_inputs=loaded.args,
        example_kwargs=loaded.kwargs,
        loss_fn=loaded.loss_fn,
        strategies=strategies,
        optimizer_model=optimizer_model_of(factory, loaded.model),
        progress=console.progress,
        **planning_arguments(options),
    )
    known = (planned.plan, planned.captured.graph, planned.programs)
    data, text = explain_json(*known), explain(*known)
    if strategies:
        data["comparison"] = [asdict(row) for row in comparison]
        text = f"{text}\n{render_comparison(comparison)}\n"
    if options.output is not None:
        save_plan(planned.plan, options.output)
        console.note(f"wrote {options.output}")
        data["path"] = str(options.output)
    console.result(data, text)


COMMAND = Command(
    name="plan",
    summary="find the fastest plan that fits, with a certificate of how good it is",
    examples=(
        "cutset plan model.py:build --devices 4 -o plan.json",
        "cutset plan model.py:build --devices cluster.toml --memory-limit 70 --json",
        "cutset plan model.py:build --devices h100:8 --mesh data=2,tensor=4 --zero 1",
        "cutset plan model.py:build --devices 2 --profile blocks -o plan.json",
        "cutset plan model.py:build --devices h100:8 --compare ddp,fsdp,tp,pp",
        "cutset plan model.py:build --devices cluster.toml --mode infer --objective throughput",
        "cutset plan my.models:llama --devices 8 --microbatches 16 --schedule 1f1b -o plan.json",
    ),
    configure=_configure,
    run=_run,
)
