from __future__ import annotations

import pytest

from cutset.compiler.ir.cluster import Cluster, Device, Link, LinkRule
from cutset.cost_models.links import (
    all_gather_seconds,
    all_reduce_seconds,
    all_to_all_seconds,
    group_link,
    reduce_scatter_seconds,
    transfer_seconds,
)
from cutset.cost_models.presets import device_type

FAST, SLOW = Link(1e-6, 100e9), Link(1e-5, 10e9)


@pytest.fixture
def cluster() -> Cluster:
    devices = tuple(Device(index, "h100", f"node{index // 2}") for index in range(4))
    rules = (LinkRule(FAST, same_node=True), LinkRule(SLOW))
    return Cluster("test", (device_type("h100"),), devices, rules)


def test_one_message(cluster: Cluster) -> None:
    assert transfer_seconds(cluster, 0, 1, 1e9) == pytest.approx(1e-6 + 1e9 / 100e9)
    assert transfer_seconds(cluster, 1, 2, 1e9) == pytest.approx(1e-5 + 1e9 / 10e9)
    assert transfer_seconds(cluster, 2, 2, 1e9) == 0.0


def test_a_ring_runs_at_its_slowest_link(cluster: Cluster) -> None:
    assert group_link(cluster, (0, 1)) == FAST
    assert group_link(cluster, (3, 0, 2, 1)) == SLOW


def test_ring_collectives(cluster: Cluster) -> None:
    """4 devices: 3 hops, each of a quarter of the tensor; all-reduce goes round twice."""
    hop = 1e-5 + (1e9 / 4) / 10e9
    assert reduce_scatter_seconds(cluster, range(4), 1e9) == pytest.approx(3 * hop)
    assert all_gather_seconds(cluster, range(4), 1e9) == pytest.approx(3 * hop)
    assert all_to_all_seconds(cluster, range(4), 1e9) == pytest.approx(3 * hop)
    assert all_reduce_seconds(cluster, range(4), 1e9) == pytest.approx(6 * hop)


def test_a_group_of_one_needs_no_time(cluster: Cluster) -> None:
    for collective in (all_reduce_seconds, all_gather_seconds):
        assert collective(cluster, (2,), 1e9) == 0.0
        assert collective(cluster, (2, 2), 1e9) == 0.0
