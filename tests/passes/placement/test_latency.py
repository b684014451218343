"""Latency placement equals the best of everything on small random problems."""

from __future__ import annotations

from functools import partial

import pytest

from cutset.compiler.ir.workload import Workload
from cutset.cost_models.placement import latency, piece_latency
from cutset.passes.placement.latency import place_latency
from cutset.passes.placement.latency_bounds import latency_bound
from cutset.passes.placement.latency_incumbent import LatencyResult
from cutset.passes.placement.latency_problem import latency_problem
from cutset.passes.placement.result import PlacementResult

from .latency_brute import optimum, random_latency_workload
from .optima import check_against_optima, chunks

# 100 problems in the normal suite, 300 more in the slow one; each in both modes
SEEDS = chunks(10, normal=100, slow=400)


@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "free"])
@pytest.mark.parametrize("seeds", SEEDS, ids=lambda seeds: f"from{seeds.start}")
def test_equals_the_best_of_everything(seeds: range, contiguous: bool) -> None:
    def value_of(workload: Workload, result: PlacementResult) -> float | None:
        assert isinstance(result, LatencyResult)
        assert latency_bound(latency_problem(workload)) <= result.value * (1 + 1e-9)
        if contiguous:
            assert result.pieces is None
            return latency(workload, result.placement)
        assert result.pieces is not None
        return piece_latency(workload, result.placement, result.pieces)

    check_against_optima(
        seeds,
        partial(random_latency_workload, most_operators=10 if contiguous else 8),
        partial(optimum, contiguous=contiguous),
        partial(place_latency, contiguous=contiguous, time_limit=60, gap=0),
        value_of,
        tolerance=3e-6,
    )
