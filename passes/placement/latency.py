"""Placement of operators for latency: where each runs so that one sample is through soonest.

With `contiguous` a machine (a device that is not concurrent) runs one piece; without, any number of
pieces one after another (`cost_models.placement.latency` and `piece_latency` are the objectives).
Heuristics give a first placement; CP-SAT then looks for a better one and proves a bound, on the
operators themselves where the graph is small enough, else on groups of them for better placements
only, while the bound is that of paths and work. Every value is computed in floating point on the
original graph.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ...compiler.ir.errors import InfeasibleError, UsageError
from ...compiler.ir.workload import Workload
from ...cost_models.placement import latency, piece_latency, violations
from .latency_bounds import latency_bound
from .latency_contiguous import build_contiguous
from .latency_problem import LatencyProblem, latency_problem
from .latency_schedule import build_schedule
from .latency_ticks import Effort, Found, Ticks, solve
from .result import PlacementResult

__all__ = ["LatencyResult", "place_latency"]

Pieces = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class LatencyResult(PlacementResult):
    """A placement for latency.

    Args:
        pieces: operators that a machine runs together, in the order in which machines take them
            up; None: every machine runs one piece.
    """

    pieces: Pieces | None = None


def _ignore(line: str) -> None:
    """Show no progress."""

