"""`cutset profile`: the times that were measured on this machine and are kept for later plans."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING

from ..ir.errors import UsageError
from ..words import plural, seconds_text
from .command import Command, positive_float
from .console import Console

if TYPE_CHECKING:
    from ..profile_database import Record

__all__ = ["COMMAND"]

_DAY_SECONDS = 86400.0
_PHASES = {
    "part": ("forward_seconds", "backward_input_seconds", "backward_weight_seconds"),
    "nodes": ("forward_seconds",),
    "instruction": ("instruction_seconds",),
    "message": ("message_seconds", "byte_seconds"),
}
_NAMELESS = {
    "part": "of no module",
    "nodes": "nodes, each in its place",
    "instruction": "an instruction",
    "message": "a message",
}


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("list", "clear"))
    parser.add_argument(
        "--older-than", type=positive_float, metavar="DAYS", help="clear: only what is older"
    )
    parser.add_argument(
        "--device",
        default="",
        metavar="TEXT",
        help="only what was measured on hardware whose name contains this",
    )


def _run(options: argparse.Namespace, console: Console) -> None:
    from ...runtime.launcher import cache_directory
    from ..profile_database import ProfileDatabase

    database = ProfileDatabase(cache_directory())
    if options.action == "clear":
        age = (options.older_than or 0.0) * _DAY_SECONDS
        removed = database.clear(older_than_seconds=age, device=options.device)
        data = {"directory": str(database.directory), "removed": removed}
        console.result(data, f"removed {plural(removed, 'record')} from {database.directory}")
        return
    if options.older_than is not None:
        raise UsageError(
            "--older-than is for clear", where="profile list", ways_out=("leave it out",)
        )
    wanted = options.device.lower()
    records = [item for item in database.records() if wanted in item.key.device.lower()]
    data = {"directory": str(database.directory), "records": [_json(item) for item in records]}
    console.result(data, _text(records, str(database.directory)))


def _json(record: Record) -> dict[str, object]:
    key = record.key
    return {
        "kind": key.kind.value,
        "path": record.path,
        "num_nodes": record.num_nodes,
        "device": key.device,
        "mode": key.mode,
        "runs_as": _runs_as(record),
        "torch": key.torch,
        **dict(zip(_PHASES[key.kind], _phases(record), strict=True)),
        "measured_at": record.measured_at,
        "content": key.content,
    }


def _phases(record: Record) -> tuple[float, ...]:
    """Seconds by phase: of nodes, which are of a forward pass, the sum."""
    return (sum(record.seconds[:-1]),) if record.key.kind == "nodes" else record.seconds


def _runs_as(record: Record) -> str:
    words = ["compiled" if record.key.compiled else "eager"]
    return " ".join([*words, *(["in CUDA graphs"] if record.key.cuda_graphs else [])])


def _text(records: list[Record], directory: str) -> str:
    lines = [f"{plural(len(records), 'record')} in {directory}"]
    device = None
    now = time.time()
    for record in records:
        if record.key.device != device:
            device = record.key.device
            lines.append(device)
        times = " + ".join(map(seconds_text, _phases(record)))
        days = max(0.0, now - record.measured_at) / _DAY_SECONDS
        name = record.path or _NAMELESS[record.key.kind]
        lines.append(
            f"  {name:<28} {record.num_nodes:>4} ops  {times:<30} "
            f"{record.key.mode}, {_runs_as(record)}, torch {record.key.torch}, {days:.1f} days old"
        )
    return "\n".join(lines)


COMMAND = Command(
    name="profile",
    summary="list or clear the times of blocks that were measured on this machine",
    examples=(
        "cutset profile list",
        "cutset profile list --device h200 --json",
        "cutset profile clear --older-than 30",
    ),
    configure=_configure,
    run=_run,
)
