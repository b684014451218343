"""Predicted against measured: seconds of a step and peak memory, over models and plans.

    python benchmarks/prediction.py [--devices 2,4] [--models gpt2,t5] [--plans data=2,pipeline=2]
        [--cluster cluster.toml] [--profile off] [--repeats 8] [--json out/prediction.json]

Each pair of a model and a plan is planned, its programs are simulated, and it trains on workers of
one thread each; medians of warm steps count. All pairs run twice, one round after the other: the
difference between the two is the noise of the machine, which no prediction can be better than.
Memory is the peak of every rank in one step, by the allocator's events, against the planner's
bound. Prints a table and writes it as JSON, with a picture beside it.

On CPUs each worker needs a core of its own, and the driver one more.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from _figures import Point, errors_of, rank_correlation, scatter_svg
from _runs import (
    Case,
    Measured,
    Planned,
    Workers,
    measure_memory,
    measure_steps,
    phase_seconds,
    plan_all,
    record_trace,
)
from _workloads import ON_CPU, ON_CUDA

from cutset.cost_models import parse_devices

BAND = 0.08  # in the picture
PLANS = {  # by number of devices: for every model, then for some in turn
    1: (("auto",), ()),
    2: (("pipeline=2", "data=2", "tensor=2"), ()),
    4: (
        (),
        (
            ("pipeline=4", "data=2,tensor=2"),
            ("data=2,pipeline=2", "data=4:zero=2"),
            ("pipeline=2,tensor=2", "data=4"),
            ("pipeline=4:schedule=gpipe", "data=4:zero=3"),
        ),
    ),
}
VARIANTS = {
    "plain": {"compile": False, "cuda_graphs": False},
    "eager": {"compile": False, "cuda_graphs": True},
    "compiled": {"compile": True, "cuda_graphs": True},
}


@dataclass
class Pair:
    """A case, how it is run, and what was measured in each round."""

    planned: Planned
    variant: str
    rounds: list[Measured] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)
    phases: dict[str, float] = field(default_factory=dict)
    error: str = ""

    @property
    def title(self) -> str:
        return f"{self.planned.case} ({self.variant})"


def main() -> int:
    options = _parse()
    torch.set_num_threads(1)
    began = time.perf_counter()
    cluster = parse_devices(options.cluster or f"{options.backend}:{max(options.devices)}")
    planned = []
    for found in plan_all(_cases(options), cluster, profile=options.profile, jobs=options.jobs):
        _say(f"{found.case}: {found.error or f'planned in {found.seconds:.1f} s'}")
        planned.append(found)
    pairs = [
        Pair(entry, variant, error=entry.error) for entry in planned for variant in options.variants
    ]
    loads = [os.getloadavg()[0]]
    with Workers(cluster) as workers:
        for number in range(2):
            for pair in sorted(pairs, key=lambda entry: entry.planned.case.devices):
                if not pair.error:
                    _measure(pair, workers, options.repeats, last=number == 1)
    loads.append(os.getloadavg()[0])
    rows = [_row(pair) for pair in pairs if not pair.error]
    print(_table(rows))
    for pair in pairs:
        if pair.error:
            print(f"{pair.title}: {pair.error.splitlines()[0]}")
    summary = _summary(rows) if rows else {}
    summary |= {"cores": len(os.sched_getaffinity(0)), "loads": loads, "profile": options.profile}
    summary["seconds"] = time.perf_counter() - began
    print("\n".join(f"{name}: {value}" for name, value in summary.items()))
    failed = {pair.title: pair.error for pair in pairs if pair.error}
    _write(options.json, rows, summary, failed)
    return 0 if rows else 1


def _cases(options: argparse.Namespace) -> list[Case]:
    cases = []
    for place, model in enumerate(options.models):
        for devices in options.devices:
            plans = options.plans
            if plans is None:
                always, turns = PLANS[devices]
                plans = always + (turns[place % len(turns)] if turns else ())
            cases += [Case(model, devices, plan) for plan in plans]
    return cases


def _measure(pair: Pair, workers: Workers, repeats: int, *, last: bool) -> None:
    planned = pair.planned.planned
    assert planned is not None
    began = time.perf_counter()
    try:
        parallel = workers.parallel(planned, **VARIANTS[pair.variant])
        pair.rounds.append(measure_steps(parallel, planned, repeats))
        if last:
            pair.phases = phase_seconds(record_trace(parallel, planned), len(planned.programs))
            pair.peaks = measure_memory(parallel, planned)
    except Exception as error:  # the other pairs are still worth measuring
        pair.error = f"{type(error).__name__}: {error}"
    _say(f"{pair.title}: {pair.error or f'ran in {time.perf_counter() - began:.1f} s'}")


def _row(pair: Pair) -> dict[str, Any]:
    planned, simulation = pair.planned.planned, pair.planned.simulation
    assert planned is not None and simulation is not None
    prediction = planned.plan.prediction
    assert prediction is not None
    measured = statistics.median(
        seconds for measured in pair.rounds for seconds in measured.seconds
    )
    first, second = (entry.median for entry in pair.rounds)
    bounds = [entry.total_bytes for entry in prediction.memory]
    fullest = max(range(len(pair.peaks)), key=pair.peaks.__getitem__)
    return {
        "model": pair.planned.case.model,
        "devices": pair.planned.case.devices,
        "plan": pair.planned.case.plan,
        "variant": pair.variant,
        "mesh": str(planned.plan.mesh),
        "zero": planned.plan.zero_level,
        "microbatches": planned.plan.num_microbatches,
        "measured_seconds": measured,
        "predicted_seconds": simulation.step_seconds,
        "planner_seconds": prediction.step_seconds,
        "error": simulation.step_seconds / measured - 1.0,
        "planner_error": prediction.step_seconds / measured - 1.0,
        "noise": abs(second / first - 1.0),
        "bound_bytes": bounds,
        "simulated_bytes": list(simulation.peak_memory_bytes),
        "peak_bytes": pair.peaks,
        "memory_error": bounds[fullest] / pair.peaks[fullest] - 1.0,
        "least_bound": min(b / peak for b, peak in zip(bounds, pair.peaks, strict=True)),
        "measured_phases": pair.phases,
        "predicted_phases": phase_seconds(simulation.events, len(planned.programs)),
        "planning_seconds": pair.planned.seconds,
        "rounds": [asdict(entry) for entry in pair.rounds],
    }


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [
        f"{'model':9} {'plan':28} {'variant':8} {'micro':>5} {'measured ms':>11} "
        f"{'predicted':>9} {'error':>7} {'planner':>9} {'error':>7} {'noise':>6} | "
        f"{'peak MiB':>8} {'bound':>8} {'error':>7} {'least':>6}"
    ]
    for row in rows:
        peak = max(range(len(row["peak_bytes"])), key=row["peak_bytes"].__getitem__)
        lines.append(
            f"{row['model']:9} {row['plan']:28} {row['variant']:8} {row['microbatches']:>5} "
            f"{row['measured_seconds'] * 1e3:>11.1f} {row['predicted_seconds'] * 1e3:>9.1f} "
            f"{row['error']:>+7.1%} {row['planner_seconds'] * 1e3:>9.1f} "
            f"{row['planner_error']:>+7.1%} {row['noise']:>6.1%} | "
            f"{row['peak_bytes'][peak] / 2**20:>8.1f} {row['bound_bytes'][peak] / 2**20:>8.1f} "
            f"{row['memory_error']:>+7.1%} {row['least_bound']:>6.2f}"
        )
    return "\n".join(lines)


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    def pairs(key: str) -> list[tuple[float, float]]:
        return [(row[key], row["measured_seconds"]) for row in rows]

    noises = [row["noise"] for row in rows]
    memory = [(1.0 + row["memory_error"], 1.0) for row in rows]
    return {
        "step time, simulated": asdict(errors_of(pairs("predicted_seconds"))),
        "step time, planner's": asdict(errors_of(pairs("planner_seconds"))),
        "rank correlation": rank_correlation(pairs("predicted_seconds")),
        "noise": {"median": statistics.median(noises), "worst": max(noises)},
        "peak memory": asdict(errors_of(memory)),
        "least bound over peak": min(row["least_bound"] for row in rows),
    }


def _write(
    path: Path, rows: list[dict[str, Any]], summary: dict[str, Any], failed: dict[str, str]
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    result = {"summary": summary, "rows": rows, "failed": failed}
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {path}")
    if not rows:
        return
    points = [
        Point(
            row["measured_seconds"] * 1e3,
            row["predicted_seconds"] * 1e3,
            row["model"],
            f"{row['model']}, {row['plan']}, {row['variant']}: {row['error']:+.1%}",
        )
        for row in rows
    ]
    picture = scatter_svg(points, title="Seconds of a step", unit="ms", band=BAND)
    path.with_suffix(".svg").write_text(picture)
    print(f"wrote {path.with_suffix('.svg')}")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _parse() -> argparse.Namespace:
    def names(text: str) -> list[str]:
        return text.split(",")

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--devices", type=lambda text: [int(n) for n in text.split(",")])
    parser.add_argument("--models", type=names, help="comma-separated")
    parser.add_argument(
        "--plans",
        type=lambda text: tuple(text.split(";")),
        help="separated by `;`: a mesh or auto, then pinned decisions, as data=4:zero=2",
    )
    parser.add_argument("--profile", choices=("off", "blocks", "ops"), default="off")
    parser.add_argument("--cluster", help="a cluster file of as many devices at least")
    parser.add_argument("--repeats", type=int, default=8, help="measured steps of a round")
    parser.add_argument("--variants", type=names, help=", ".join(VARIANTS))
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 1) - 2))
    parser.add_argument("--json", type=Path, default=Path("out/prediction.json"))
    options = parser.parse_args()
    on_cpu = options.backend == "cpu"
    options.devices = options.devices or ([2, 4] if on_cpu else [1])
    options.models = options.models or list(ON_CPU if on_cpu else ON_CUDA)
    options.variants = options.variants or (["plain"] if on_cpu else ["eager", "compiled"])
    if not on_cpu and torch.cuda.device_count() < max(options.devices):
        parser.exit(0, f"this machine has {torch.cuda.device_count()} CUDA devices\n")
    return options


if __name__ == "__main__":
    sys.exit(main())
