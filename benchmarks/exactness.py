"""How exact partitioned training is: every model, stage count, schedule and precision.

    python benchmarks/exactness.py [--models gpt2,t5] [--device cuda] [--workers] [-o out.json]

Trains each model three optimizer steps partitioned and unpartitioned, over the same microbatches
and random streams, and prints the worst relative error of loss, inference outputs, gradients of
the first step and weights after the last, with the tensor that has it. Ranks take turns in this
process (fast) or are real processes (`--workers`). Exit code 1 if any error exceeds its bound.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).absolute().parents[1]))

from cutset.runtime.inprocess import InProcessSession
from cutset.runtime.launcher import launch_local
from cutset.runtime.session import Session
from tests.exactness.harness import Numerics, Subject, adamw64, sgd32
from tests.models.exact import EXACT_MODELS

NUMERICS = {"float64 adamw": adamw64, "float32 sgd": sgd32}
KINDS = ("loss", "outputs", "gradients", "weights")


def main() -> int:
    options = _parse()
    sessions: dict[int, Session] = {}
    rows = []
    print(
        f"{'model':12} {'numerics':14} {'stages':>6} {'schedule':8} "
        + " ".join(f"{kind:>10}" for kind in KINDS)
        + "  worst weight"
    )
    for name in options.models.split(","):
        for title, numerics in NUMERICS.items():
            rows += _model_rows(name, title, numerics, options, sessions)
    for session in sessions.values():
        session.close()
    failed = [row for row in rows if not row["passed"]]
    print(f"{len(rows) - len(failed)} passed, {len(failed)} failed")
    if options.output:
        Path(options.output).write_text(json.dumps({"rows": rows}, indent=1))
    return 1 if failed or not rows else 0


def _model_rows(
    name: str,
    title: str,
    numerics: Numerics,
    options: argparse.Namespace,
    sessions: dict[int, Session],
) -> list[dict[str, object]]:
    rows = []
    subject = Subject(EXACT_MODELS[name], numerics, device=options.device)
    for stages in map(int, options.stages.split(",")):
        for schedule in options.schedules.split(","):
            session = _session(stages, options, sessions)
            began = time.perf_counter()
            errors = subject.errors(stages, schedule, session)
            passed = all(error.value <= numerics.tolerance for error in errors.values())
            rows.append(
                {
                    "model": name,
                    "numerics": title,
                    "stages": stages,
                    "schedule": schedule,
                    "errors": {kind: errors[kind].value for kind in KINDS},
                    "worst": {kind: errors[kind].tensor for kind in KINDS},
                    "tolerance": numerics.tolerance,
                    "passed": passed,
                    "seconds": time.perf_counter() - began,
                }
            )
            print(
                f"{name:12} {title:14} {stages:6} {schedule:8} "
                + " ".join(f"{errors[kind].value:10.1e}" for kind in KINDS)
                + f"  {errors['weights'].tensor}{'' if passed else '  FAILED'}",
                flush=True,
            )
    return rows


def _session(stages: int, options: argparse.Namespace, sessions: dict[int, Session]) -> Session:
    if not options.workers:
        return InProcessSession(stages, torch.device(options.device))
    if stages not in sessions:
        places = [torch.device(options.device)] * stages
        sessions[stages] = launch_local(stages, devices=places)
    return sessions[stages]


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(EXACT_MODELS), help="comma-separated")
    parser.add_argument("--stages", default="2,3,4")
    parser.add_argument("--schedules", default="1f1b,gpipe")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", action="store_true", help="real processes over gloo")
    parser.add_argument("-o", "--output", help="write JSON here")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
