"""Predicted memory bound against measured peak, for every rank of the exactness models.

    python benchmarks/memory.py [--models gpt2,t5] [--cases pipeline=2,data=2+zero1] [-o out.json]

Each model trains on real workers; one step runs under torch's allocator events, which give the peak
of parameters, gradients, optimizer states, activations, transients and buffers of collectives. A
case is a mesh of workers, with the level of ZeRO over its axis `data` where one is given. A bound
must never be below the peak, and should not be far above it: medians of bound / peak are printed,
for pipeline plans and for plans that share the batch or tensors.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).absolute().parents[1]))

from cutset.runtime.launcher import launch_local
from cutset.runtime.session import Session
from tests.exactness.harness import Subject, adamw64, sgd32
from tests.exactness.memory import MemoryCase, RankMemory, measure
from tests.models.exact import SHARDED_MODELS

NUMERICS = {"float64 adamw": adamw64, "float32 sgd": sgd32}
CASES = (
    "pipeline=2",
    "data=2",
    "data=4",
    "tensor=2",
    "data=2,tensor=2",
    "data=2,pipeline=2,tensor=2",
    *(f"data={size}+zero{level}" for size in (2, 4) for level in (1, 2, 3)),
)


def main() -> int:
    options = _parse()
    rows: list[dict[str, Any]] = []
    print(
        f"{'model':18} {'numerics':14} {'case':28} {'schedule':8} {'rank':>4} {'bound MiB':>10} "
        f"{'simulated':>10} {'peak MiB':>10} {'bound/peak':>10}"
    )
    cases = sorted(options.cases, key=lambda case: case.mesh.size)
    for size, group in itertools.groupby(cases, key=lambda case: case.mesh.size):
        session = launch_local(size)
        for row in _measured(options, list(group), session):
            rows.append(row)
            _print_row(row)
        session.close()
    below = sum(
        [
            _summary("pipeline plans", [row for row in rows if not row["sharded"]]),
            _summary("sharded plans", [row for row in rows if row["sharded"]]),
        ]
    )
    if options.output:
        Path(options.output).write_text(json.dumps({"rows": rows}, indent=1))
    return 1 if below or not rows else 0


def _measured(
    options: argparse.Namespace, cases: Sequence[MemoryCase], session: Session
) -> Iterator[dict[str, Any]]:
    for name, title in itertools.product(options.models.split(","), NUMERICS):
        subjects: dict[int, Subject] = {}
        for case in cases:
            count = case.num_microbatches
            if count not in subjects:
                subjects[count] = Subject(
                    SHARDED_MODELS[name], NUMERICS[title], num_microbatches=count
                )
            for schedule in ("1f1b",) if case.is_sharded else ("1f1b", "gpipe"):
                for rank in measure(subjects[count], case, schedule, session):
                    yield _row(name, title, case, schedule, rank)


def _row(
    name: str, title: str, case: MemoryCase, schedule: str, memory: RankMemory
) -> dict[str, Any]:
    return {
        "model": name,
        "numerics": title,
        "case": str(case),
        "sharded": case.is_sharded,
        "schedule": schedule,
        **asdict(memory),
    }


def _print_row(row: dict[str, Any]) -> None:
    sizes = (row["bound_bytes"], row["simulated_bytes"], row["peak_bytes"])
    print(
        f"{row['model']:18} {row['numerics']:14} {row['case']:28} {row['schedule']:8} "
        f"{row['rank']:4} " + " ".join(f"{size / 2**20:10.3f}" for size in sizes),
        f"{row['bound_bytes'] / row['peak_bytes']:9.2f}",
        flush=True,
    )


def _summary(title: str, rows: list[dict[str, Any]]) -> int:
    """Print the ratios; how many bounds are below the peak."""
    if not rows:
        return 0
    ratios = [row["bound_bytes"] / row["peak_bytes"] for row in rows]
    below = sum(ratio < 1 for ratio in ratios)
    print(
        f"{title}: bound/peak: median {statistics.median(ratios):.2f}, smallest {min(ratios):.2f}, "
        f"largest {max(ratios):.2f}; {below} of {len(ratios)} bounds are below the peak"
    )
    return below


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(SHARDED_MODELS), help="comma-separated")
    parser.add_argument(
        "--cases",
        nargs="+",
        type=MemoryCase.parse,
        default=[MemoryCase.parse(text) for text in CASES],
    )
    parser.add_argument("-o", "--output", help="write JSON here")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
