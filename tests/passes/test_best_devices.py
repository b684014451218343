"""Devices that are no slower than any of a cluster."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cutset.compiler.ir.cluster import Cluster, Link
from cutset.compiler.ir.mesh import Mesh
from cutset.cost_models.presets import local_cpu_cluster
from cutset.passes.best_devices import BestDevices
from cutset.passes.columns import stage_devices

from .test_mixed_devices import drawn, planned, two_speeds


def best_of(machine: Cluster) -> BestDevices:
    found = BestDevices.of(machine)
    assert found is not None
    return found


def test_all_devices_are_of_the_fastest_type_over_faster_links() -> None:
    machine = two_speeds(1, 1, 0.5)
    found = best_of(machine)
    assert found.paces == {"chip": 1.0, "slower": 2.0}
    assert [kind.name for kind in found.cluster.types] == ["chip"]
    assert {device.type for device in found.cluster.devices} == {"chip"}
    link = machine.links[0].link
    faster = Link(link.latency_seconds / 2, link.bytes_per_second * 2)
    assert found.cluster.links[0].link == faster
    assert found.cluster.types[0].overhead_seconds == machine.types[0].overhead_seconds / 2


@pytest.mark.parametrize(
    ("mesh", "count", "expected"),
    [
        ("pipeline=2,data=2", 1, 2 * 1.0),  # all on the fast stage
        ("pipeline=2,data=2", 8, 2 * 9 / 1.5),
        ("data=2,pipeline=2", 8, 2 * 9 / 1.0),  # both stages are as slow as the slow devices
    ],
)
def test_rounds_of_a_step(mesh: str, count: int, expected: float) -> None:
    machine = two_speeds(2, 2, 0.5)
    found = best_of(machine).rounds(machine, stage_devices(Mesh.parse(mesh)), count)
    assert found == pytest.approx(expected)


def test_nothing_is_known_where_no_type_is_the_fastest_or_hosts_carry_messages() -> None:
    machine = two_speeds(1, 1, 0.5)
    first, second = machine.types
    wide = replace(second, memory_bytes_per_second=4 * first.memory_bytes_per_second)
    assert BestDevices.of(replace(machine, types=(first, wide))) is None
    lacking = replace(first, unsupported_ops=("aten.relu.default",))
    assert BestDevices.of(replace(machine, types=(lacking, second))) is None
    assert BestDevices.of(local_cpu_cluster(2)) is None


def test_bounds_come_close_where_stages_are_unlike() -> None:
    """Work divided perfectly is 42 % below the best plan here."""
    found = planned(*drawn(1))
    assert found is not None and found.certificate is not None
    assert found.certificate.gap < 0.01
