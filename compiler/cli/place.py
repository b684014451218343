"""`cutset place`: place the operators of a cost-annotated graph on devices."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .command import Command, positive_float
from .console import Console

if TYPE_CHECKING:
    from ...passes.placement.result import PlacementResult
    from ..ir.workload import Workload

__all__ = ["COMMAND"]

_LEAST_SECONDS = 0.1  # that a search is given, however long reading the file took
_METHODS = ("auto", "greedy", "interval-dp", "local-search", "balanced-cut", "exact")


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "workload", type=Path, metavar="WORKLOAD", help="JSON; see docs/workload-format.md"
    )
    parser.add_argument(
        "--objective",
        choices=("throughput", "latency"),
        default="throughput",
        help="least load of the busiest device, or least time of one sample (default: throughput)",
    )
    parser.add_argument(
        "--non-contiguous",
        action="store_true",
        help="a device may run several pieces (default: one, so that devices form a pipeline)",
    )
    parser.add_argument(
        "--method",
        choices=_METHODS,
        default="auto",
        help="auto: search with a proof, down to --gap; exact: until the gap is closed; the others "
        f"are baselines, balanced-cut by {_library()}",
    )
    parser.add_argument(
        "--devices",
        type=_count,
        metavar="K",
        help="number of accelerators, instead of the file's (the last kind not concurrent)",
    )
    parser.add_argument(
        "--time-limit",
        type=positive_float,
        metavar="S",
        help="seconds from the start of the command (default: 55; where operators times devices "
        "exceed 15000, what no program proves: 8 at 1000 operators, 24 at 5000, 65 at 20000)",
    )
    parser.add_argument(
        "--gap",
        type=_fraction,
        default=1e-4,
        metavar="G",
        help="stop when the value is proven to be within this fraction (default: 0.0001)",
    )
    parser.add_argument(
        "-o", "--output", type=Path, metavar="PLACEMENT", help="write the placement here"
    )


def _library() -> str:
    import importlib.util

    found = importlib.util.find_spec("pymetis")
    return "METIS (pymetis is installed)" if found else "networkx, as pymetis is not installed"


def _count(text: str) -> int:
    number = int(text) if text.isdecimal() else -1
    if not 0 <= number <= 100_000:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0 to 100000")
    return number


def _fraction(text: str) -> float:
    number = float(text)
    if not 0.0 <= number < 1.0:
        raise argparse.ArgumentTypeError(f"{text} is not a fraction from 0 up to 1")
    return number


def _run(options: argparse.Namespace, console: Console) -> None:
    from ...passes.placement.methods import place, usual_seconds
    from ..files import check_target
    from ..workload_json import load_workload, placement_to_json, save_placement

    if options.output is not None:
        check_target(options.output, "placement")
    file = load_workload(options.workload)
    if options.devices is not None:
        file = file.with_devices(options.devices)
    workload = file.view(options.objective)
    console.progress(
        f"{len(workload.operators)} operators, {len(workload.edges)} edges, "
        f"{workload.num_devices} devices"
    )
    seconds = options.time_limit or usual_seconds(workload)
    result = place(
        workload,
        objective=options.objective,
        contiguous=not options.non_contiguous,
        method=options.method,
        time_limit=seconds,
        gap=options.gap,
        progress=_shown_by(console),
        begin=max(console.started, time.monotonic() - seconds + _LEAST_SECONDS),
    )
    data = _figures(workload, result, options)
    if options.output is not None:
        pieces = getattr(result, "pieces", None)
        text = placement_to_json(file, options.objective, result.placement, pieces)
        save_placement(text, options.output)
        console.note(f"wrote {options.output}")
    console.result(data, _text(data))


def _shown_by(console: Console) -> Callable[[float, float], None]:
    last = ""

    def show(value: float, bound: float) -> None:
        nonlocal last
        gap = (value - bound) / value if value else 0.0
        line = f"value {value:.6g}, bound {bound:.6g}, gap {gap:.3%}"
        if line != last:
            console.progress(line)
        last = line

    return show


def _figures(
    workload: Workload, result: PlacementResult, options: argparse.Namespace
) -> dict[str, Any]:
    return {
        "objective": options.objective,
        "objective_value": result.value,
        "lower_bound": result.lower_bound,
        "gap": result.gap,
        "seconds": result.seconds,
        "loads": _loads(workload, result, options.objective),
        "method": result.method,
        "contiguous": not options.non_contiguous,
        "placement": None if options.output is None else str(options.output),
    }


def _loads(workload: Workload, result: PlacementResult, objective: str) -> list[dict[str, Any]]:
    from ...cost_models.placement import device_loads, memory_used

    loads = device_loads(workload, result.placement)
    used = memory_used(workload, result.placement)
    rows = []
    for device, kind_number in enumerate(workload.kind_of):
        kind = workload.kinds[kind_number]
        free = objective == "latency" and kind.concurrent
        moving = 0.0 if free else loads[device].communication
        rows.append(
            {
                "device": device,
                "kind": kind.name,
                "compute": loads[device].compute,
                "communication": moving,
                "total": loads[device].compute + moving,
                "memory": used[device],
            }
        )
    return rows


def _text(data: dict[str, Any]) -> str:
    lines = [
        f"{data['objective']} {data['objective_value']:.6g}, bound {data['lower_bound']:.6g}, "
        f"gap {data['gap']:.3%}, {data['seconds']:.1f} s",
        data["method"],
    ]
    lines.extend(
        f"device {row['device']} ({row['kind']}): {row['total']:.6g} = "
        f"{row['compute']:.6g} computing + {row['communication']:.6g} moving, "
        f"{row['memory']:.0f} bytes"
        for row in data["loads"]
    )
    return "\n".join(lines)


COMMAND = Command(
    name="place",
    summary="place the operators of a cost-annotated graph, with a bound on how good it can get",
    examples=(
        "cutset place workload.json -o placement.json",
        "cutset place workload.json --objective latency --json -o placement.json",
        "cutset place workload.json --non-contiguous --devices 4 --time-limit 20 --gap 0.01",
        "cutset place workload.json --method interval-dp --json",
    ),
    configure=_configure,
    run=_run,
)
