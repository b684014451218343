"""CPU workers that share cores: what they have while all compute, and while fewer do."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cutset.compiler.ir.cluster import Cluster, Device, DeviceType, Link, LinkRule
from cutset.cost_models.shared_cores import SharedCores
from cutset.cost_models.simulator import Simulation, simulate
from cutset.cost_models.stages import StageSeconds
from tests.cost_models.test_simulator import FREE, LAST, WHOLE, cluster, programs
from tests.ir.builders import mlp


def workers(threads: tuple[int | None, ...], cores: int | None, nodes: str = "") -> Cluster:
    """One worker of each number of threads, on the nodes that letters name."""
    types = tuple(
        DeviceType(f"t{index}", "cpu", 1 << 30, 1e9, (("f32", 1e9),), threads=own, cores=cores)
        for index, own in enumerate(threads)
    )
    devices = tuple(
        Device(index, f"t{index}", nodes[index : index + 1] or "a") for index in range(len(threads))
    )
    return Cluster("few", types, devices, (LinkRule(Link(0.0, 1e9)),))


@pytest.mark.parametrize(
    ("where", "shares"),
    [
        (workers((1, 1, 1, 1), 2), (0.5,) * 4),
        (workers((1, 1), 2), (1.0, 1.0)),
        (workers((1, 1, 1, 1), None), (1.0,) * 4),
        (workers((3, 1), 2), (0.5, 0.5)),
        (workers((None, None, None), 2), (2 / 3,) * 3),  # one thread each
        (workers((None, None), 8), (1.0, 1.0)),
        (workers((1, 1, 1), 1, nodes="aab"), (0.5, 0.5, 1.0)),
    ],
)
def test_what_workers_have_while_all_compute(where: Cluster, shares: tuple[float, ...]) -> None:
    found = [where.core_share(device.index) for device in where.devices]
    assert found == pytest.approx(shares)


def test_those_that_compute_have_the_cores_of_those_that_wait() -> None:
    cores = SharedCores(workers((1, 1, 1, 1), 2))
    assert cores.computes(0, True) == (0,) and cores.speed(0) == 2.0  # a core of its own
    assert cores.computes(1, True) == (0, 1) and cores.speed(0) == cores.speed(1) == 2.0
    assert cores.computes(2, True) == (0, 1, 2)
    assert [cores.speed(rank) for rank in range(3)] == pytest.approx([4 / 3] * 3)
    cores.computes(3, True)
    assert cores.speed(3) == 1.0
    assert cores.computes(0, False) == (1, 2, 3) and cores.speed(1) == pytest.approx(4 / 3)


def test_nodes_share_nothing() -> None:
    cores = SharedCores(workers((1, 1, 1, 1), 1, nodes="aabb"))
    for rank in (0, 2, 3):
        cores.computes(rank, True)
    assert [cores.speed(rank) for rank in (0, 2, 3)] == [2.0, 1.0, 1.0]


def pipelined(cores: int | None) -> Simulation:
    """Two stages on two workers of a thread; while both compute, each action takes a second."""
    where = cluster(Link(0.0, 1e30))
    (kind,) = where.types
    where = replace(where, types=(replace(kind, threads=1, cores=cores),))
    seconds = StageSeconds(1.0, 1.0, 1.0)
    return simulate(
        programs(mlp(), where, (WHOLE, LAST), 4), cluster=where, optimizer=FREE,
        measured={0: seconds, 1: seconds},
    )  # fmt: skip


def test_a_pipeline_on_one_core_has_no_bubble() -> None:
    """12 actions a rank, half a second of the core each: it is never idle, links being free."""
    shared, apart = pipelined(1), pipelined(None)
    assert apart.step_seconds == pytest.approx(15.0)
    assert shared.step_seconds == pytest.approx(2 * 12 * 0.5)
    assert [rank.processor_seconds for rank in shared.ranks] == pytest.approx([6.0, 6.0])
    assert [rank.processor_seconds for rank in apart.ranks] == pytest.approx([12.0, 12.0])
    assert [rank.busy_seconds for rank in apart.ranks] == pytest.approx([12.0, 12.0])
