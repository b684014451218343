"""Predicted memory bound against measured peak, for every rank of the exactness models.

    python benchmarks/memory.py [--models gpt2,t5] [--stages 2] [-o out.json]

Each model trains on real workers; one step runs under torch's allocator events, which give the peak
of parameters, gradients, optimizer states, activations and transients. A bound must never be below
the peak, and should not be far above it: the median of bound / peak is printed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).absolute().parents[1]))

from cutset.runtime.launcher import launch_local
from tests.exactness.harness import Subject, adamw64, sgd32
from tests.models.exact import EXACT_MODELS

NUMERICS = {"float64 adamw": adamw64, "float32 sgd": sgd32}


def main() -> int:
    options = _parse()
    rows = []
    print(
        f"{'model':18} {'numerics':14} {'schedule':8} {'rank':>4} {'bound MiB':>10} "
        f"{'peak MiB':>10} {'bound/peak':>10}"
    )
    session = launch_local(options.stages)
    for name in options.models.split(","):
        for title, numerics in NUMERICS.items():
            subject = Subject(EXACT_MODELS[name], numerics)
            for schedule in ("1f1b", "gpipe"):
                rows += _measure(name, title, schedule, subject, options.stages, session)
    session.close()
    ratios = [row["bound_bytes"] / row["peak_bytes"] for row in rows]
    below = sum(ratio < 1 for ratio in ratios)
    print(
        f"bound/peak: median {statistics.median(ratios):.2f}, smallest {min(ratios):.2f}, "
        f"largest {max(ratios):.2f}; {below} of {len(ratios)} bounds are below the peak"
    )
    if options.output:
        Path(options.output).write_text(json.dumps({"rows": rows}, indent=1))
    return 1 if below else 0


def _measure(name: str, title: str, schedule: str, subject: Subject, stages: int, session) -> list:
    prediction = subject.planned(stages, schedule).plan.prediction
    measured = subject.run(stages, schedule, session)
    rows = []
    for bound, peak in zip(prediction.memory, measured.peak_memory_bytes, strict=True):
        rows.append(
            {
                "model": name,
                "numerics": title,
                "schedule": schedule,
                "rank": bound.device,
                "bound_bytes": bound.total_bytes,
                "peak_bytes": peak,
            }
        )
        print(
            f"{name:18} {title:14} {schedule:8} {bound.device:4} "
            f"{bound.total_bytes / 2**20:10.3f} {peak / 2**20:10.3f} "
            f"{bound.total_bytes / peak:10.2f}",
            flush=True,
        )
    return rows


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(EXACT_MODELS), help="comma-separated")
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("-o", "--output", help="write JSON here")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
