"""Loads, legality and contiguity agree with an evaluation that shares no code with them."""

from __future__ import annotations

import random

import numpy as np
import pytest

from cutset.cost_models.placement import contiguity_breaks, device_loads, memory_used, violations
from tests.passes.placement.brute import evaluate, random_workload


@pytest.mark.parametrize("seed", range(100))
def test_agrees_with_an_independent_evaluation(seed: int) -> None:
    workload = random_workload(seed, most_operators=14, most_devices=5)
    rng = random.Random(seed)
    count, devices = len(workload.operators), workload.num_devices
    placements = np.array([[rng.randrange(devices) for _ in range(count)] for _ in range(20)])
    # monotone over positions: often contiguous
    placements[10:].sort(axis=1)
    loads, legal, acyclic = evaluate(workload, placements)
    for row, placement in enumerate(placements.tolist()):
        totals = [load.total for load in device_loads(workload, placement)]
        supported = all(
            workload.operators[v].times[workload.kind_of[d]] is not None
            for v, d in enumerate(placement)
        )
        if supported:
            assert totals == pytest.approx(loads[row].tolist())
        assert (not violations(workload, placement)) == legal[row]
        assert (not contiguity_breaks(workload, placement)) == acyclic[row]
        assert sum(memory_used(workload, placement)) == pytest.approx(
            sum(operator.size for operator in workload.operators)
        )


def test_a_device_that_does_not_exist_is_a_violation() -> None:
    workload = random_workload(0)
    placement = [workload.num_devices] * len(workload.operators)
    assert violations(workload, placement)[0].endswith("which does not exist")
