"""How exact partitioned training is: every model, stage count, schedule, mesh and precision.

    python benchmarks/exactness.py [--models gpt2,t5] [--device cuda] [--workers] [-o out.json]
    python benchmarks/exactness.py --mesh tensor=2 data=2,pipeline=2,tensor=2 [--layouts random:7]

Trains each model three optimizer steps partitioned and unpartitioned, over the same microbatches
and random streams, and prints the worst relative error of loss, inference outputs, gradients of
the first step and weights after the last, with the tensor that has it. With `--mesh`, tensors are
split over the axes of each mesh given, and its axis `pipeline` gives the stages; layouts are those
in which values flow without exchange, or random legal ones. Ranks live in this process (fast) or
are real processes (`--workers`). Exit code 1 if any error exceeds its bound.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).absolute().parents[1]))

from cutset.compiler.ir.mesh import Mesh
from cutset.runtime.inprocess import InProcessSession
from cutset.runtime.launcher import launch_local
from cutset.runtime.session import Session
from tests.exactness.harness import Subject, adamw64, sgd32, sharded_tolerance_of
from tests.models.exact import EXACT_MODELS, SHARDED_MODELS

NUMERICS = {"float64 adamw": adamw64, "float32 sgd": sgd32}
KINDS = ("loss", "outputs", "gradients", "weights")


@dataclass(frozen=True, slots=True)
class Case:
    """A model in one precision under one plan."""

    model: str
    numerics: str
    mesh: Mesh
    schedule: str


def main() -> int:
    options = _parse()
    sessions: dict[int, Session] = {}
    width = max(len(str(mesh)) for mesh in options.mesh)
    print(
        f"{'model':16} {'numerics':13} {'mesh':{width}} {'schedule':8} "
        + " ".join(f"{kind:>9}" for kind in KINDS)
        + "  worst weight"
    )
    rows = []
    for name, title in itertools.product(options.models.split(","), NUMERICS):
        subject = Subject(
            options.table[name],
            NUMERICS[title],
            device=options.device,
            clip_grad_norm=options.clip,
        )
        for mesh, schedule in itertools.product(options.mesh, options.schedules.split(",")):
            case = Case(name, title, mesh, schedule)
            rows.append(_row(subject, case, options, sessions))
            _print_row(rows[-1], width)
    for session in sessions.values():
        session.close()
    failed = [row for row in rows if not row["passed"]]
    print(f"{len(rows) - len(failed)} passed, {len(failed)} failed")
    if options.output:
        Path(options.output).write_text(json.dumps({"rows": rows}, indent=1))
    return 1 if failed or not rows else 0


def _row(
    subject: Subject, case: Case, options: argparse.Namespace, sessions: dict[int, Session]
) -> dict[str, Any]:
    session = _session(case.mesh.size, options, sessions)
    began = time.perf_counter()
    tolerance = subject.numerics.tolerance
    if options.sharded:
        tolerance = sharded_tolerance_of(case.model, subject.numerics)
        errors = subject.sharded_errors(
            case.mesh, session, seed=options.layouts, schedule=case.schedule
        )
    else:
        errors = subject.errors(case.mesh.size, case.schedule, session)
    return {
        "model": case.model,
        "numerics": case.numerics,
        "mesh": str(case.mesh),
        "schedule": case.schedule,
        "layouts": "flowing" if options.layouts is None else f"random:{options.layouts}",
        "clip_grad_norm": options.clip,
        "errors": {kind: errors[kind].value for kind in KINDS},
        "worst": {kind: errors[kind].tensor for kind in KINDS},
        "tolerance": tolerance,
        "passed": all(error.value <= tolerance for error in errors.values()),
        "seconds": time.perf_counter() - began,
    }


def _print_row(row: dict[str, Any], width: int) -> None:
    print(
        f"{row['model']:16} {row['numerics']:13} {row['mesh']:{width}} {row['schedule']:8} "
        + " ".join(f"{row['errors'][kind]:9.1e}" for kind in KINDS)
        + f"  {row['worst']['weights']}{'' if row['passed'] else '  FAILED'}",
        flush=True,
    )


def _session(num_ranks: int, options: argparse.Namespace, sessions: dict[int, Session]) -> Session:
    if not options.workers:
        return InProcessSession(num_ranks, torch.device(options.device))
    if num_ranks not in sessions:
        on_cuda = options.device == "cuda"
        places = [torch.device("cuda", rank) for rank in range(num_ranks)] if on_cuda else None
        backend = "nccl" if on_cuda else "gloo"
        sessions[num_ranks] = launch_local(num_ranks, backend=backend, devices=places)
    return sessions[num_ranks]


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(EXACT_MODELS), help="comma-separated")
    parser.add_argument("--stages", default="2,3,4", help="without --mesh")
    parser.add_argument("--schedules", default="", help="default: 1f1b, without --mesh gpipe too")
    parser.add_argument("--mesh", nargs="+", type=Mesh.parse, help="data=2,pipeline=2,tensor=2")
    parser.add_argument("--layouts", type=_seed, default=None, help="flowing or random:SEED")
    parser.add_argument("--clip", type=float, help="clip the global norm of gradients to this")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", action="store_true", help="real processes, on CUDA one a GPU")
    parser.add_argument("-o", "--output", help="write JSON here")
    options = parser.parse_args()
    options.sharded = options.mesh is not None
    options.table = SHARDED_MODELS if options.sharded else EXACT_MODELS
    options.schedules = options.schedules or ("1f1b" if options.sharded else "1f1b,gpipe")
    if not options.sharded:
        options.mesh = [Mesh.parse(f"pipeline={count}") for count in options.stages.split(",")]
    return options


def _seed(text: str) -> int | None:
    """The seed of random layouts; None for flowing ones."""
    kind, _, seed = text.partition(":")
    if kind == "random" and seed.isdigit():
        return int(seed)
    if text != "flowing":
        raise argparse.ArgumentTypeError(f"{text!r} is neither flowing nor random:SEED")
    return None


if __name__ == "__main__":
    sys.exit(main())
