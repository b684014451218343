"""Throughput placement equals the best of all placements on small random problems."""

from __future__ import annotations

import pytest

from cutset.compiler.ir.errors import InfeasibleError
from cutset.cost_models.placement import contiguity_breaks, device_loads, violations
from cutset.passes.placement.throughput import place_throughput

from .brute import optimum, random_workload

# 160 problems in the normal suite, 400 more in the slow one; each for both modes
CHUNK = 20
SEEDS = [
    *(range(first, first + CHUNK) for first in range(0, 160, CHUNK)),
    *(
        pytest.param(range(first, first + CHUNK), marks=pytest.mark.slow)
        for first in range(160, 560, CHUNK)
    ),
]
TOLERANCE = 2e-6  # relative: proofs do not tell closer values apart


@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "free"])
@pytest.mark.parametrize("seeds", SEEDS, ids=lambda seeds: f"from{seeds.start}")
def test_equals_the_best_of_all_placements(seeds: range, contiguous: bool) -> None:
    feasible = 0
    for seed in seeds:
        workload = random_workload(seed)
        best = optimum(workload, contiguous=contiguous)
        if best is None:
            with pytest.raises(InfeasibleError):
                place_throughput(workload, contiguous=contiguous, time_limit=60, gap=0)
            continue
        feasible += 1
        result = place_throughput(workload, contiguous=contiguous, time_limit=60, gap=0)
        assert not violations(workload, result.placement), seed
        assert not contiguous or not contiguity_breaks(workload, result.placement), seed
        loads = device_loads(workload, result.placement)
        assert result.value == max(load.total for load in loads), seed
        assert result.value == pytest.approx(best, rel=TOLERANCE, abs=1e-12), seed
        assert result.lower_bound <= best * (1 + 1e-9), seed
        assert result.gap <= TOLERANCE, seed
    assert feasible > len(seeds) / 2
