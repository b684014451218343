"""Throughput placement equals the best of all placements on small random problems."""

from __future__ import annotations

from functools import partial

import pytest

from cutset.compiler.ir.workload import Workload
from cutset.cost_models.placement import contiguity_breaks, device_loads
from cutset.passes.placement.result import PlacementResult
from cutset.passes.placement.throughput import place_throughput

from .brute import optimum, random_workload
from .optima import check_against_optima, chunks

# 100 problems in the normal suite, 460 more in the slow one; each for both modes
SEEDS = chunks(20, normal=100, slow=560)


@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "free"])
@pytest.mark.parametrize("seeds", SEEDS, ids=lambda seeds: f"from{seeds.start}")
def test_equals_the_best_of_all_placements(seeds: range, contiguous: bool) -> None:
    def largest_load(workload: Workload, result: PlacementResult) -> float:
        assert not contiguous or not contiguity_breaks(workload, result.placement)
        return max(load.total for load in device_loads(workload, result.placement))

    check_against_optima(
        seeds,
        random_workload,
        partial(optimum, contiguous=contiguous),
        partial(place_throughput, contiguous=contiguous, time_limit=60, gap=0),
        largest_load,
        tolerance=2e-6,
    )
