"""On devices that differ, what the search chooses is no slower than what may be pinned.

Small graphs on two to four devices of two speeds, or on three alike; meshes of any number of the
devices are pinned one after the other.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from dataclasses import replace

import pytest

from cutset.compiler.ir.cluster import Cluster
from cutset.compiler.ir.errors import InfeasibleError, UsageError
from cutset.compiler.ir.graph import Graph
from cutset.compiler.ir.mesh import Mesh
from cutset.compiler.ir.plan import Plan
from cutset.cost_models.presets import limit_memory
from cutset.passes.context import PlanOptions
from cutset.passes.mesh_space import is_uneven, mesh_sizes, meshes
from cutset.passes.pipeline import plan_graph

from .joint import random_graph
from .layouts.test_choose import cluster

OPTIONS = PlanOptions(recompute="none")
SEEDS = range(6)
SHORT = (2, 4)
MANY = 40
SPEEDS = (0.2, 0.5, 0.8)
EXACT = 1e-9


def two_speeds(first: int, second: int, share: float, bytes_per_second: float = 1e9) -> Cluster:
    """Some devices on one node, then some on another that have a `share` of their rates."""
    machine = cluster(first + second, bytes_per_second, 1e-6)
    kind = machine.types[0]
    other = replace(
        kind,
        name="slower",
        flops_per_second=tuple((name, share * rate) for name, rate in kind.flops_per_second),
        memory_bytes_per_second=share * kind.memory_bytes_per_second,
    )
    devices = tuple(
        device if device.index < first else replace(device, type="slower", node="old")
        for device in machine.devices
    )
    return replace(machine, types=(kind, other), devices=devices)


def drawn(seed: int) -> tuple[Graph, Cluster, int]:
    """A graph, a machine and a batch."""
    draw = random.Random(seed * 7 + 3)
    counts = draw.choice(((1, 1), (2, 1), (1, 2), (2, 2), (3, 1), (3, 0)))
    machine = two_speeds(*counts, draw.choice(SPEEDS), draw.choice((1e8, 1e9, 1e11)))
    return random_graph(seed, draw.choice((3, 4))), machine, draw.choice((32, 64))


def planned(graph: Graph, machine: Cluster, batch: int, **pinned: object) -> Plan | None:
    options = replace(OPTIONS, **pinned)  # type: ignore[arg-type]
    with contextlib.suppress(InfeasibleError, UsageError):
        return plan_graph(graph, machine, batch_size=batch, options=options)
    return None


def pinnable(machine: Cluster, rows: int) -> Iterator[dict[str, object]]:
    for size in range(1, len(machine.devices) + 1):
        yield from ({"mesh": mesh} for mesh in meshes(size, rows))


def check(graph: Graph, machine: Cluster, batch: int) -> None:
    chosen = planned(graph, machine, batch)
    assert chosen is not None and chosen.certificate is not None
    most = chosen.objective_seconds * (1 - OPTIONS.tolerance)
    for pinned in pinnable(machine, batch):
        other = planned(graph, machine, batch, **pinned)
        if other is not None:
            assert other.objective_seconds >= most, pinned
            bound = chosen.certificate.lower_bound
            assert bound <= other.objective_seconds * (1 + EXACT), pinned


@pytest.mark.parametrize("seed", SEEDS)
def test_nothing_that_may_be_pinned_is_faster(seed: int) -> None:
    check(*drawn(seed))


@pytest.mark.slow
def test_nothing_that_may_be_pinned_is_faster_on_many() -> None:
    for seed in range(len(SEEDS), MANY):
        check(*drawn(seed))


@pytest.mark.slow
@pytest.mark.parametrize("seed", SHORT)
def test_nothing_that_may_be_pinned_is_faster_where_memory_is_short(seed: int) -> None:
    graph, machine, batch = drawn(seed)
    free = planned(graph, machine, batch)
    assert free is not None and free.prediction is not None
    most = max(entry.total_bytes for entry in free.prediction.memory)
    for share in (0.6, 0.75, 0.9):
        small = limit_memory(machine, int(share * most))
        if planned(graph, small, batch) is not None:
            check(graph, small, batch)
            return
    pytest.fail("nothing fits into less memory than the fastest plan takes")


def test_fast_devices_share_rows_where_single_ones_would_wait_for_messages() -> None:
    """Four fast devices and four slow ones: two stages of four, not eight of one."""
    graph = random_graph(3, 12, plain=True)
    machine = two_speeds(4, 4, 0.5, 1e11)
    chosen = planned(graph, machine, 64)
    assert chosen is not None and chosen.stage_mesh.size > 1
    single = planned(graph, machine, 64, mesh=Mesh.parse("pipeline=8"))
    assert single is not None
    assert chosen.objective_seconds < single.objective_seconds


def test_which_numbers_of_devices_form_meshes() -> None:
    alike = cluster(8, 1e9)
    assert not is_uneven(alike) and mesh_sizes(alike) == (8,)
    assert mesh_sizes(cluster(3, 1e9)) == (3, 2)
    assert mesh_sizes(two_speeds(2, 2, 0.5)) == (4, 3, 2)
    assert mesh_sizes(two_speeds(12, 8, 0.5)) == (20, 16, 12)
    parted = replace(alike.devices[7], node="other")
    assert is_uneven(replace(alike, devices=(*alike.devices[:7], parted)))


def test_the_certificate_says_which_devices_meshes_take() -> None:
    found = planned(random_graph(1, 3), two_speeds(2, 1, 0.5), 32)
    assert found is not None and found.certificate is not None
    space = found.certificate.search_space
    assert "meshes of 3 devices in their order, or of the first 2" in space
