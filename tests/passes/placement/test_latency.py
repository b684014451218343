"""Latency placement equals the best of everything on small random problems."""

from __future__ import annotations

import pytest

from cutset.compiler.ir.errors import InfeasibleError
from cutset.cost_models.placement import latency, piece_latency, violations
from cutset.passes.placement.latency import place_latency
from cutset.passes.placement.latency_bounds import latency_bound
from cutset.passes.placement.latency_problem import latency_problem

from .latency_brute import optimum, random_latency_workload

# 100 problems in the normal suite, 300 more in the slow one; each in both modes
CHUNK = 10
SEEDS = [
    *(range(first, first + CHUNK) for first in range(0, 100, CHUNK)),
    *(
        pytest.param(range(first, first + CHUNK), marks=pytest.mark.slow)
        for first in range(100, 400, CHUNK)
    ),
]
TOLERANCE = 3e-6  # relative: ticks do not tell closer values apart


@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "free"])
@pytest.mark.parametrize("seeds", SEEDS, ids=lambda seeds: f"from{seeds.start}")
def test_equals_the_best_of_everything(seeds: range, contiguous: bool) -> None:
    feasible = 0
    for seed in seeds:
        workload = random_latency_workload(seed, most_operators=10 if contiguous else 8)
        best = optimum(workload, contiguous=contiguous)
        if best is None:
            with pytest.raises(InfeasibleError):
                place_latency(workload, contiguous=contiguous, time_limit=60, gap=0)
            continue
        feasible += 1
        result = place_latency(workload, contiguous=contiguous, time_limit=60, gap=0)
        assert not violations(workload, result.placement), seed
        if contiguous:
            assert result.pieces is None
            assert result.value == latency(workload, result.placement), seed
        else:
            assert result.pieces is not None
            value = piece_latency(workload, result.placement, result.pieces)
            assert result.value == value, seed
        assert result.value == pytest.approx(best, rel=TOLERANCE, abs=1e-12), seed
        assert result.lower_bound <= best * (1 + 1e-9), seed
        assert result.gap <= TOLERANCE, seed
        assert latency_bound(latency_problem(workload)) <= best * (1 + 1e-9), seed
    assert feasible > len(seeds) / 2
