"""Parts of the throughput search on random problems: each against its definition."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest

from cutset.compiler.ir.workload import DeviceKind, Operator, Workload
from cutset.cost_models.placement import device_loads
from cutset.passes.placement.anneal import anneal, anneal_pieces
from cutset.passes.placement.intervals import best_pieces
from cutset.passes.placement.load_table import LoadTable
from cutset.passes.placement.orders import topological_orders
from cutset.passes.placement.problem import PlacementProblem, placement_problem
from cutset.passes.placement.reduce import below
from cutset.passes.placement.reduction_bound import reduction_bound
from cutset.passes.placement.throughput import place_throughput
from cutset.passes.placement.unit_bound import least_load
from cutset.passes.placement.windows import windows
from cutset.passes.placement.work_bound import work_bound

from .brute import optimum, random_workload

SEEDS = range(40)


def random_slots(problem: PlacementProblem, rng: random.Random) -> list[int]:
    """A supported slot for every unit; memory may be exceeded."""
    return [
        rng.choice(
            [s for s, k in enumerate(problem.slots) if math.isfinite(problem.times[unit, k])]
        )
        for unit in range(problem.num_units)
    ]


def in_order(
    problem: PlacementProblem, slot_of: tuple[int, ...], sequence: tuple[int, ...]
) -> bool:
    return all(sequence.index(slot_of[u]) <= sequence.index(slot_of[v]) for u, v in problem.arcs)


@pytest.mark.parametrize("seed", SEEDS)
def test_moves_keep_loads_up_to_date(seed: int) -> None:
    workload, rng = random_workload(seed, most_devices=4), random.Random(seed)
    problem = placement_problem(workload, contiguous=False)
    if not np.isfinite(problem.times).any(axis=1).all():
        pytest.skip("a colour that no device supports")
    table = LoadTable(problem, random_slots(problem, rng))
    for _ in range(30):
        unit = rng.randrange(problem.num_units)
        slot = random_slots(problem, rng)[unit]
        if slot != table.slot_of[unit]:
            table.move(unit, slot)
    fresh = LoadTable(problem, table.slot_of)
    assert table.load == pytest.approx(fresh.load, abs=1e-9)
    assert table.used == pytest.approx(fresh.used, abs=1e-9)
    assert table.pins_on == fresh.pins_on
    true = device_loads(workload, problem.placement(table.slot_of))
    numbers = [device for group in problem.devices for device in group]
    assert fresh.load == pytest.approx([true[d].total for d in numbers], abs=1e-9)


@pytest.mark.parametrize("seed", SEEDS)
def test_pieces_of_an_order_are_its_best_intervals(seed: int) -> None:
    problem = placement_problem(random_workload(seed, most_operators=5), contiguous=True)
    for order in itertools.islice(topological_orders(problem, count=3), 3):
        assert sorted(order) == list(range(problem.num_units))
        place = {unit: index for index, unit in enumerate(order)}
        assert all(place[u] < place[v] for u, v in problem.arcs)
        best = math.inf
        ends = itertools.combinations_with_replacement(
            range(len(order) + 1), problem.num_devices - 1
        )
        for cuts in ends:
            for sequence in set(itertools.permutations(range(problem.num_devices))):
                slots = [sequence[sum(place[u] >= cut for cut in cuts)] for u in range(len(order))]
                kinds = [problem.slots[s] for s in slots]
                if np.isfinite(problem.times[np.arange(len(order)), kinds]).all():
                    table = LoadTable(problem, slots)
                    best = min(best, table.value if table.legal else math.inf)
        found = best_pieces(problem, order)
        if found is None:
            assert best == math.inf
        else:
            assert LoadTable(problem, found.slot_of).value == pytest.approx(best)
            assert in_order(problem, found.slot_of, found.sequence)


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("seed", SEEDS)
def test_bounds_without_search_are_below_the_optimum(seed: int, contiguous: bool) -> None:
    workload = random_workload(seed, most_operators=8)
    best = optimum(workload, contiguous=contiguous)
    if best is None:
        pytest.skip("infeasible")
    problem = placement_problem(workload, contiguous=contiguous)
    bound = work_bound(problem).value
    assert bound <= best * (1 + 1e-9)
    further = reduction_bound(
        problem, bound, 2 * best + 1, contiguous=contiguous, seconds_left=lambda: 1.0
    )
    assert bound <= further <= best * (1 + 1e-9)
    if contiguous:
        assert windows(problem, best * (1 + 1e-9)) is not None


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("seed", SEEDS)
def test_reduction_keeps_what_is_below_the_value(seed: int, contiguous: bool) -> None:
    workload = random_workload(seed, most_operators=5)
    best = optimum(workload, contiguous=contiguous)
    if best is None or best == 0:
        pytest.skip("infeasible, or without work")
    problem = placement_problem(workload, contiguous=contiguous)
    reduced = below(problem, best * 1.001, contiguous=contiguous)
    assert reduced is not None
    slots = range(problem.num_devices)
    values = []
    for merged in itertools.product(slots, repeat=reduced.problem.num_units):
        kinds = [problem.slots[slot] for slot in merged]
        if np.isfinite(reduced.problem.times[np.arange(len(kinds)), kinds]).all():
            table = LoadTable(problem, reduced.expand(list(merged)))
            acyclic = not contiguous or any(
                in_order(problem, tuple(table.slot_of), sequence)
                for sequence in itertools.permutations(slots)
            )
            if table.legal and acyclic:
                values.append(table.value)
    assert min(values) == pytest.approx(best)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_core_is_what_a_unit_shares_a_device_with_at_least_load(seed: int) -> None:
    problem = placement_problem(random_workload(seed, most_operators=7), contiguous=False)
    for unit, kind in itertools.product(range(problem.num_units), range(len(problem.devices))):
        if not math.isfinite(problem.times[unit, kind]):
            continue
        others = [other for other in range(problem.num_units) if other != unit]
        best = min(
            load_of(problem, {unit, *chosen}, kind)
            for number in range(len(others) + 1)
            for chosen in itertools.combinations(others, number)
        )
        load, core = least_load(problem, unit, kind, best or 1.0)
        assert load == pytest.approx(best, rel=1e-6)
        assert load <= best * (1 + 1e-12)
        assert unit in core
        assert load_of(problem, set(core), kind) == pytest.approx(best, rel=1e-6)


def load_of(problem: PlacementProblem, units: set[int], kind: int) -> float:
    """Load of a device that holds these units and no others."""
    cut = (
        fee
        for pins, fee in zip(problem.pins, problem.fees[:, kind].tolist(), strict=True)
        if 0 < len(units & set(pins)) < len(pins)
    )
    return sum(problem.times[unit, kind] for unit in units) + sum(cut)


def test_a_net_that_must_be_cut_is_borne_by_both_ends() -> None:
    """Two heavy ends of a long way, with a result from the one to the other."""
    operators = [
        Operator(f"v{v}", (time,), (fee,))
        for v, (time, fee) in enumerate([(1.0, 3.0), (5.0, 0.5), (5.0, 0.5), (6.0, 0.5)])
    ]
    workload = Workload(
        (DeviceKind("device", 4),), tuple(operators), ((0, 1), (0, 3), (1, 2), (2, 3))
    )
    problem = placement_problem(workload, contiguous=True)
    assert reduction_bound(
        problem, 0.0, 12.0, contiguous=True, seconds_left=lambda: 10.0
    ) == pytest.approx(9.5, rel=1e-3)
    result = place_throughput(workload, contiguous=True, time_limit=10, gap=0)
    assert result.value == pytest.approx(9.5)


@pytest.mark.parametrize("seed", range(20))
def test_annealing_never_loses_and_keeps_pieces_contiguous(seed: int) -> None:
    workload = random_workload(seed, most_operators=20, most_devices=4)
    problem = placement_problem(workload, contiguous=True)
    pieces = best_pieces(problem, next(topological_orders(problem, count=1)))
    if pieces is None:
        pytest.skip("no intervals fit")
    before = LoadTable(problem, pieces.slot_of).value
    better, value = anneal_pieces(problem, pieces, seconds=0.02, at_most=5.0)
    assert value == pytest.approx(LoadTable(problem, better.slot_of).value)
    assert value <= before and LoadTable(problem, better.slot_of).legal
    assert in_order(problem, better.slot_of, better.sequence)
    free, least = anneal(problem, pieces.slot_of, seconds=0.02, at_most=5.0)
    assert least <= before and LoadTable(problem, free).legal
