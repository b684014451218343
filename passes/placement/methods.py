"""Placement by a named method: the solvers with proofs, and the baselines to compare them with."""

from __future__ import annotations

import math
from typing import Literal

from ...compiler.ir.workload import Workload
from .balanced_cut import cut_library
from .baselines import BASELINES, place_baseline
from .incumbent import Progress
from .latency import place_latency
from .result import PlacementResult
from .throughput import place_throughput

__all__ = ["METHODS", "Method", "Objective", "cut_library", "place", "usual_seconds"]

Objective = Literal["throughput", "latency"]
Method = Literal["auto", "exact", "greedy", "interval-dp", "local-search", "balanced-cut"]
METHODS: tuple[Method, ...] = ("auto", "exact", *BASELINES)

_SECONDS = 55.0  # of graphs that programs may prove
_MOST_PAIRS = 15_000  # operators times devices of such graphs
_SECONDS_OF_LARGE, _EXPONENT = 8.0, 0.7  # of graphs of 1,000 operators, and how it grows
_MOST_SECONDS = 90.0


def usual_seconds(workload: Workload) -> float:
    """Time limit for a graph when nobody names one.

    Where no program proves anything, most of what a search finds it finds early.
    """
    size = len(workload.operators)
    if size * workload.num_devices <= _MOST_PAIRS:
        return _SECONDS
    return min(_SECONDS_OF_LARGE * math.pow(max(size / 1000, 1.0), _EXPONENT), _MOST_SECONDS)


def place(
    workload: Workload,
    *,
    objective: Objective,
    contiguous: bool,
    method: Method = "auto",
    time_limit: float | None = None,
    gap: float = 0.0,
    progress: Progress | None = None,
    begin: float | None = None,
) -> PlacementResult:
    """Place operators for an objective.

    Args:
        workload: as the objective numbers its devices.
        contiguous: one piece a device.
        method: `auto` stops at `gap`; `exact` goes on until the gap is closed or the time is over;
            the others are baselines.
        time_limit: seconds; None: `usual_seconds`.
        gap: relative gap between value and bound at which `auto` stops.
        progress: called with the best value and bound when one of them improves.
        begin: `time.monotonic()` from which the time limit counts; None: now.

    Raises:
        InfeasibleError: no placement satisfies the constraints, or a baseline finds none.
        UsageError: the method does not serve this mode.
    """
    seconds = usual_seconds(workload) if time_limit is None else time_limit
    if method == "auto" or method == "exact":
        solver = place_throughput if objective == "throughput" else place_latency
        return solver(
            workload,
            contiguous=contiguous,
            time_limit=seconds,
            gap=0.0 if method == "exact" else gap,
            progress=progress,
            begin=begin,
        )
    return place_baseline(
        workload,
        method,
        objective=objective,
        contiguous=contiguous,
        time_limit=seconds,
        progress=progress,
        begin=begin,
    )
