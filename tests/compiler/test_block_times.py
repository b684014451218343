"""What workers measured at the same time becomes one time of each device."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cutset.compiler.block_times import BlockWorkers, ProfileOptions, Runs, slowest_phases
from cutset.cost_models import parse_devices

STEADY: Runs = [(0.04, 0.05, 0.01)] * 4
UNSTEADY: Runs = [(0.03, 0.03, 0.02), (0.06, 0.08, 0.0)] * 2


def workers(devices: str, **given: int) -> BlockWorkers:
    cluster = parse_devices(devices)
    kinds = tuple(replace(kind, **given) for kind in cluster.types)
    return BlockWorkers(replace(cluster, types=kinds, local=True), ProfileOptions("blocks"))


def test_of_two_devices_the_slower_counts_in_every_window() -> None:
    assert slowest_phases([STEADY, UNSTEADY]) == pytest.approx((0.05, 0.065, 0.015))
    assert slowest_phases([STEADY]) == pytest.approx(STEADY[0])


def test_moments_shorter_than_a_window_are_joined() -> None:
    """Each device is the slower one every other time: over a window they are alike."""
    turns: Runs = [(1e-3, 0.0, 0.0), (3e-3, 0.0, 0.0)] * 15
    assert slowest_phases([turns, turns[::-1]]) == pytest.approx((2e-3, 0.0, 0.0), rel=0.05)


def test_runs_that_only_one_device_made_do_not_count() -> None:
    assert slowest_phases([STEADY, STEADY[:1]]) == pytest.approx(STEADY[0])


def test_a_part_that_takes_no_time_has_none() -> None:
    assert slowest_phases([[(0.0, 0.0, 0.0)] * 3] * 2) == (0.0, 0.0, 0.0)


def test_workers_with_cores_of_their_own_wait_for_each_other() -> None:
    found = workers("cpu:2", threads=1)
    slowest = pytest.approx((0.05, 0.065, 0.015))
    assert [found._row([STEADY, UNSTEADY], index) for index in (0, 1)] == [slowest, slowest]


def test_workers_that_share_cores_leave_theirs_to_others() -> None:
    found = workers("cpu:2", threads=1, cores=1)
    rows = [found._row([STEADY, UNSTEADY], index) for index in (0, 1)]
    assert rows == [pytest.approx(STEADY[0]), pytest.approx((0.045, 0.055, 0.01))]


def test_where_one_has_no_room_the_other_counts() -> None:
    found = workers("cpu:2", threads=1)
    assert found._row(["no room", STEADY], 0) == "no room"
    assert found._row(["no room", STEADY], 1) == pytest.approx(STEADY[0])
