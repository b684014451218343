"""What is told of planned and measured pairs: a table, a summary, JSON and a picture."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from _figures import Point, errors_of, rank_correlation, scatter_svg
from _runs import Measured, Planned, phase_seconds

__all__ = ["Pair", "row_of", "summary_of", "table_of", "write"]

BAND = 0.08  # in the picture


@dataclass
class Pair:
    """A case, how it is run, and what was measured in each round."""

    planned: Planned
    rounds: list[Measured] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)
    phases: dict[str, float] = field(default_factory=dict)
    busy: list[float] = field(default_factory=list)
    error: str = ""

    @property
    def title(self) -> str:
        return f"{self.planned.case} ({self.planned.case.variant})"


def row_of(pair: Pair) -> dict[str, Any]:
    planned, simulation = pair.planned.planned, pair.planned.simulation
    assert planned is not None and simulation is not None
    prediction, certificate = planned.plan.prediction, planned.plan.certificate
    assert prediction is not None and certificate is not None
    measured = statistics.median(
        seconds for measured in pair.rounds for seconds in measured.seconds
    )
    first, second = (entry.median for entry in pair.rounds)
    bounds = [entry.bound_bytes for entry in prediction.memory]
    fullest = max(range(len(pair.peaks)), key=pair.peaks.__getitem__)
    return {
        "model": pair.planned.case.model,
        "devices": pair.planned.case.devices,
        "plan": pair.planned.case.plan,
        "variant": pair.planned.case.variant,
        "mesh": str(planned.plan.mesh),
        "zero": planned.plan.zero_level,
        "microbatches": planned.plan.num_microbatches,
        "measured_seconds": measured,
        "predicted_seconds": simulation.step_seconds,
        "planner_seconds": certificate.objective,
        "error": simulation.step_seconds / measured - 1.0,
        "planner_error": certificate.objective / measured - 1.0,
        "noise": abs(second / first - 1.0),
        "predicted_busy_seconds": [rank.processor_seconds for rank in simulation.ranks],
        "busy_seconds": pair.busy,
        "busy_error": sum(r.processor_seconds for r in simulation.ranks) / sum(pair.busy) - 1.0,
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


def table_of(rows: list[dict[str, Any]]) -> str:
    lines = [
        f"{'model':9} {'plan':28} {'variant':8} {'micro':>5} {'measured ms':>11} "
        f"{'predicted':>9} {'error':>7} {'planner':>9} {'error':>7} {'noise':>6} {'busy':>7} | "
        f"{'peak MiB':>8} {'bound':>8} {'error':>7} {'least':>6}"
    ]
    for row in rows:
        peak = max(range(len(row["peak_bytes"])), key=row["peak_bytes"].__getitem__)
        lines.append(
            f"{row['model']:9} {row['plan']:28} {row['variant']:8} {row['microbatches']:>5} "
            f"{row['measured_seconds'] * 1e3:>11.1f} {row['predicted_seconds'] * 1e3:>9.1f} "
            f"{row['error']:>+7.1%} {row['planner_seconds'] * 1e3:>9.1f} "
            f"{row['planner_error']:>+7.1%} {row['noise']:>6.1%} "
            f"{row['busy_error']:>+7.1%} | "
            f"{row['peak_bytes'][peak] / 2**20:>8.1f} {row['bound_bytes'][peak] / 2**20:>8.1f} "
            f"{row['memory_error']:>+7.1%} {row['least_bound']:>6.2f}"
        )
    return "\n".join(lines)


def summary_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    def pairs(key: str) -> list[tuple[float, float]]:
        return [(row[key], row["measured_seconds"]) for row in rows]

    noises = [row["noise"] for row in rows]
    busy = [(1.0 + row["busy_error"], 1.0) for row in rows]
    memory = [(1.0 + row["memory_error"], 1.0) for row in rows]
    return {
        "step time, simulated": asdict(errors_of(pairs("predicted_seconds"))),
        "step time, by the planner's formula": asdict(errors_of(pairs("planner_seconds"))),
        "busy time of ranks": asdict(errors_of(busy)),
        "rank correlation": rank_correlation(pairs("predicted_seconds")),
        "noise": {"median": statistics.median(noises), "worst": max(noises)},
        "peak memory": asdict(errors_of(memory)),
        "least bound over peak": min(row["least_bound"] for row in rows),
    }


def write(
    path: Path, rows: list[dict[str, Any]], summary: dict[str, Any], failed: dict[str, str]
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    result = {"summary": summary, "rows": rows, "failed": failed}
    path.write_text(json.dumps(result, indent=1) + "\n")
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
