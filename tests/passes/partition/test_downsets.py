from __future__ import annotations

import itertools
import math

from hypothesis import given, settings

from cutset.passes.partition.downsets import (
    DeviceOrders,
    DownSets,
    all_down_sets,
    outlook,
    search_chains,
)
from cutset.passes.partition.objective import is_legal, stage_figures
from cutset.passes.partition.problem import Assignment, StageProblem
from cutset.passes.partition.search import simple_bound

from .brute import brute_force, chain, problems


def test_all_down_sets_of_a_diamond() -> None:
    edges = ((0, 1), (0, 2), (1, 3), (2, 3))
    assert all_down_sets(4, edges, 100) == (0b0, 0b1, 0b11, 0b101, 0b111, 0b1111)
    assert all_down_sets(4, edges, 5) is None


def complete(problem: StageProblem) -> DownSets:
    every = all_down_sets(len(problem.units), problem.edges(), 1000)
    assert every is not None
    return DownSets(problem, every, complete=True)


@settings(max_examples=40)
@given(problems())
def test_tables_agree_with_the_figures_of_stages(problem: StageProblem) -> None:
    """One stage at a time: the difference of two down-sets costs what the stage costs."""
    table = complete(problem)
    chains = itertools.islice(itertools.combinations(range(1, table.size - 1), 1), 6)
    for (middle,) in chains:
        if not (table.nested[0, middle] and table.nested[middle, table.size - 1]):
            continue
        for cls, entry in enumerate(problem.classes):
            if len(entry.devices) < 2:
                continue
            partition = table.assign((middle, table.size - 1), (cls, cls))
            figures = stage_figures(problem, partition)
            link = problem.links[cls][cls]
            for stage, (first, last) in enumerate(((0, middle), (middle, table.size - 1))):
                own = figures[stage]
                assert math.isclose(table.compute[entry.type][first, last], own.compute_seconds)
                assert math.isclose(table.held[first, last], own.held_seconds)
                assert math.isclose(table.transfers(0, link)[first, last], own.receive_seconds)
                assert math.isclose(table.transfers(1, link)[first, last], own.return_seconds)
                in_flight = problem.in_flight(2, stage)
                assert table.memory(in_flight)[first, last] == own.memory_bytes


@settings(max_examples=60)
@given(problems())
def test_bounds_hold_and_partitions_are_legal(problem: StageProblem) -> None:
    table = complete(problem)
    most = min(problem.num_devices, len(problem.units))
    bounds = outlook(table, most) if len(problem.classes) == 1 else None
    for count in range(1, most + 1):
        expected, _ = brute_force(problem, (count,))
        assert simple_bound(problem, count) <= expected * (1 + 1e-9)
        if bounds is not None:
            assert bounds[count - 1] <= expected * (1 + 1e-9)
        orders = DeviceOrders.all(
            tuple(len(entry.devices) for entry in problem.classes), count, 10_000
        )
        assert orders is not None
        found = search_chains(table, count, orders, cutoff=math.inf, num_thresholds=40)
        if found.assignment is not None:
            assert is_legal(problem, found.assignment)
            assert found.seconds >= expected * (1 - 1e-9)
        alike = len({link for row in problem.links for link in row}) == 1
        if alike:
            assert found.lower_bound <= expected * (1 + 1e-9)
            assert (found.assignment is None) == math.isinf(expected)


def test_device_orders_use_no_device_twice() -> None:
    orders = DeviceOrders.all((1, 2), 3, 1000)
    assert orders is not None
    paths = {(): 0}
    for arcs in orders.arcs:
        paths = {
            (*path, cls): target
            for path, state in paths.items()
            for source, target, cls, _ in arcs
            if source == state
        }
    assert sorted(paths) == [(0, 1, 1), (1, 0, 1), (1, 1, 0)]
    assert DeviceOrders.all((8, 8, 8), 24, 100) is None


def test_an_assignment_names_devices_in_ascending_order() -> None:
    problem = chain((1.0, 1.0, 1.0), devices=3)
    assert Assignment((0, 1, 2), (0, 0, 0)).devices(problem) == (0, 1, 2)
