"""`cutset calibrate`: measure the devices and links at hand, and write a cluster file."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .command import Command
from .console import Console

if TYPE_CHECKING:
    from ..calibrate import Calibration

__all__ = ["COMMAND"]


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--devices",
        metavar="DEVICES",
        help="of this machine: a number, cpu:2, cuda:2, cuda:1+cpu:2 (default: all GPUs, else one "
        "CPU worker a core; under torchrun the ranks of the job)",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="CLUSTER",
        help="write the cluster here, a .toml or .json file",
    )
    parser.add_argument(
        "--quick", action="store_true", help="fewer element types and sizes, in half the time"
    )


def _run(options: argparse.Namespace, console: Console) -> None:
    from ...cost_models.cluster_file import parse_cluster
    from ...runtime.launcher import job_rank
    from ..calibrate import FULL, QUICK, calibrate, local_devices
    from ..calibration_text import calibration_file
    from ..files import check_target, write_whole

    console.quiet = job_rank() > 0
    target: Path = options.output
    format = _format(target)
    if not console.quiet:  # the machine of another rank need not have the folder
        check_target(target, "cluster")
    _say_if_busy(console)
    effort = QUICK if options.quick else FULL
    found = calibrate(local_devices(options.devices), effort=effort, progress=console.progress)
    text = calibration_file(found, format=format)
    parse_cluster(text, name=str(target), format=format)
    if not console.quiet:
        write_whole(target, text, "cluster")
    console.note(f"wrote {target}")
    console.result(_data(found, target), _text(found))


def _say_if_busy(console: Console) -> None:
    """Other work of this machine makes it look slower than it is, its links above all."""
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load > cores / 2:
        console.note(
            f"this machine is busy (load {load:.1f} on {cores} cores): figures will be too low, "
            "measure again when it is quiet"
        )


def _format(target: Path) -> str:
    from ..ir.errors import UsageError

    format = target.suffix.removeprefix(".")
    if format not in ("toml", "json"):
        raise UsageError(
            f"a cluster file is .toml or .json, not {target.suffix or 'without a suffix'}",
            where=str(target),
            ways_out=("name a file that ends in .toml",),
        )
    return format


def _data(found: Calibration, target: Path) -> dict[str, Any]:
    from ...cost_models.cluster_text import cluster_table

    return {
        "cluster": cluster_table(found.cluster),
        "fits": [
            {
                "of": title,
                "name": quality.name,
                "samples": quality.samples,
                "median_error": quality.median_error,
                "worst_error": quality.worst_error,
            }
            for title, qualities in found.qualities
            for quality in qualities
        ],
        "seconds": found.seconds,
        "file": str(target),
    }


def _text(found: Calibration) -> str:
    from ..calibration_text import figure_lines, quality_lines

    lines = [*figure_lines(found.cluster), "", *quality_lines(found.qualities), ""]
    return "\n".join([*lines, f"measured in {found.seconds:.0f} s"])


COMMAND = Command(
    name="calibrate",
    summary="measure the devices and links of this machine and write them as a cluster file",
    examples=(
        "cutset calibrate --devices 2 -o cluster.toml",
        "cutset plan model.py:make --devices cluster.toml -o plan.json",
        "cutset calibrate --devices cuda:1+cpu:1 --quick --json -o cluster.toml",
        "torchrun --nproc-per-node 2 -m cutset calibrate -o cluster.toml",
    ),
    configure=_configure,
    run=_run,
)
