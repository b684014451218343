"""Solvers against optima found by trying everything, over many seeds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from cutset.compiler.ir.errors import InfeasibleError
from cutset.compiler.ir.workload import Workload
from cutset.cost_models.placement import violations
from cutset.passes.placement.result import PlacementResult


def chunks(size: int, *, normal: int, slow: int) -> list[Any]:
    """Ranges of seeds: those below `normal` for the normal suite, the rest for the slow one."""
    return [
        *(range(first, first + size) for first in range(0, normal, size)),
        *(
            pytest.param(range(first, first + size), marks=pytest.mark.slow)
            for first in range(normal, slow, size)
        ),
    ]


def check_against_optima(
    seeds: range,
    make: Callable[[int], Workload],
    optimum: Callable[[Workload], float | None],
    place: Callable[[Workload], PlacementResult],
    value_of: Callable[[Workload, PlacementResult], float | None],
    *,
    tolerance: float,
) -> None:
    """The solver's value is the optimum, its bound not above, and the placement worth what it says.

    Args:
        make: the problem of a seed.
        optimum: None: there is no legal placement.
        value_of: the value of a result's placement, as an evaluation has it.
        tolerance: relative; closer values are not told apart by proofs.
    """
    feasible = 0
    for seed in seeds:
        workload = make(seed)
        best = optimum(workload)
        if best is None:
            with pytest.raises(InfeasibleError):
                place(workload)
            continue
        feasible += 1
        result = place(workload)
        assert not violations(workload, result.placement), seed
        assert result.value == value_of(workload, result), seed
        assert result.value == pytest.approx(best, rel=tolerance, abs=1e-12), seed
        assert result.lower_bound <= best * (1 + 1e-9), seed
        assert result.gap <= tolerance, seed
    assert feasible > len(seeds) / 2
