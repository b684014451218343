"""Bounds from what devices can hold: against all sets of units, and all placements."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest

from cutset.compiler.ir.workload import DeviceKind, Operator, Workload
from cutset.passes.placement.cover_bound import DeviceCovers
from cutset.passes.placement.device_sweep import DeviceSweep
from cutset.passes.placement.incumbent import Incumbent
from cutset.passes.placement.problem import PlacementProblem, placement_problem
from cutset.passes.placement.work_bound import work_bound

from .brute import optimum, random_workload

SEEDS = range(60)


def load_of(problem: PlacementProblem, kind: int, held: frozenset[int]) -> float:
    fees = sum(
        float(problem.fees[net, kind])
        for net, pins in enumerate(problem.pins)
        if 0 < len(held & set(pins)) < len(pins)
    )
    return float(problem.times[sorted(held), kind].sum()) + fees


def least_loads(
    problem: PlacementProblem, kind: int, prices: list[int], highest: int
) -> list[float]:
    least = [math.inf] * (highest + 1)
    units = range(problem.num_units)
    for number in range(len(units) + 1):
        for chosen in itertools.combinations(units, number):
            amount = min(highest, sum(prices[unit] for unit in chosen))
            least[amount] = min(least[amount], load_of(problem, kind, frozenset(chosen)))
    return least


def shuffled(problem: PlacementProblem, rng: random.Random) -> list[int]:
    return rng.sample(range(problem.num_units), problem.num_units)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_sweep_finds_the_least_load_for_every_amount(seed: int) -> None:
    problem = placement_problem(random_workload(seed, most_operators=8), contiguous=False)
    rng = random.Random(seed)
    prices = [rng.randint(0, 6) for _ in range(problem.num_units)]
    highest = rng.choice([3, 12, 60])
    for kind in range(len(problem.counts)):
        sweep = DeviceSweep(problem, kind, shuffled(problem, rng), most_states=10_000)
        found = sweep.least_loads(prices, highest)
        assert found.tolist() == pytest.approx(least_loads(problem, kind, prices, highest))
        assert sweep.forgotten == 0
        for amount in np.flatnonzero(np.isfinite(found)).tolist():
            held = frozenset(sweep.units_held(amount))
            assert load_of(problem, kind, held) == pytest.approx(found[amount])
            assert min(highest, sum(prices[unit] for unit in held)) == amount


def test_a_sweep_with_few_states_is_below_and_forgets_something() -> None:
    forgotten = 0
    for seed in SEEDS:
        problem = placement_problem(random_workload(seed, most_operators=7), contiguous=False)
        rng = random.Random(seed)
        prices = [rng.randint(0, 6) for _ in range(problem.num_units)]
        for kind in range(len(problem.counts)):
            sweep = DeviceSweep(problem, kind, shuffled(problem, rng), most_states=2)
            found = sweep.least_loads(prices, 12)
            least = np.array(least_loads(problem, kind, prices, 12))
            assert (found <= least * (1 + 1e-9) + 1e-12).all()
            forgotten += sweep.forgotten
    assert forgotten > 10


@pytest.mark.parametrize("seed", range(150))
def test_covers_are_never_above_the_optimum(seed: int) -> None:
    """Whatever the value is that they start from."""
    workload = random_workload(seed, most_operators=8)
    best = optimum(workload, contiguous=False)
    if not best:
        pytest.skip("infeasible, or without work")
    problem = placement_problem(workload, contiguous=False)
    covers = DeviceCovers(problem, placement_problem(workload, contiguous=True))
    for value in (1.5 * best, best):
        known = Incumbent(workload, time_limit=60, gap=0.0)
        known.placement, known.value = (), value
        covers.prove(known, share=1.0, halve=True)
        assert known.bound <= best * (1 + 1e-9)


def test_covers_see_fees_that_work_does_not() -> None:
    """Three equal operators in a chain on two devices: one of them crosses, and both ends pay."""
    operators = tuple(Operator(f"v{v}", (4.0,), (1.0,)) for v in range(3))
    workload = Workload((DeviceKind("device", 2),), operators, ((0, 1), (1, 2)))
    problem = placement_problem(workload, contiguous=False)
    known = Incumbent(workload, time_limit=60, gap=0.0)
    known.placement, known.value = (0, 0, 1), 9.0
    covers = DeviceCovers(problem, placement_problem(workload, contiguous=True))
    covers.prove(known, share=1.0, halve=False)
    assert work_bound(problem).value == pytest.approx(6.0)
    assert known.bound == pytest.approx(9.0, rel=1e-5)
