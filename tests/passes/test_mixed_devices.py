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

from cutset.compiler.ir.cluster import Cluster, Host, Link
from cutset.compiler.ir.errors import InfeasibleError, UsageError
from cutset.compiler.ir.graph import Graph
from cutset.compiler.ir.mesh import Mesh, format_stage_meshes
from cutset.compiler.ir.plan import Plan
from cutset.cost_models.presets import limit_memory
from cutset.passes.context import PlanOptions
from cutset.passes.mesh_space import is_uneven, mesh_sizes, meshes
from cutset.passes.pipeline import plan_graph
from cutset.passes.unlike_space import unlike_meshes

from .joint import random_graph
from .layouts.test_choose import cluster

OPTIONS = PlanOptions(recompute="none")
SEEDS = range(6)
SHORT = (2, 4)
MANY = 40
SPEEDS = (0.2, 0.5, 0.8)
EXACT = 1e-9
HOST = Host(Link(1e-6, 1e10), 1 << 40, 1e10)


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
    """Meshes of any number of devices, and those of stages' own that are searched."""
    for size in range(1, len(machine.devices) + 1):
        yield from ({"mesh": mesh} for mesh in meshes(size, rows))
    yield from ({"stage_meshes": own} for own in unlike_meshes(machine, rows))


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


def test_stages_get_meshes_of_their_own_where_that_is_faster() -> None:
    """One fast device, then two slow ones."""
    graph, machine, batch = drawn(44)
    chosen = planned(graph, machine, batch)
    assert chosen is not None and chosen.is_mixed and chosen.certificate is not None
    assert chosen.mesh_text == "data=1/tensor=2"
    uniform = planned(graph, machine, batch, one_mesh=True)
    assert uniform is not None and not uniform.is_mixed
    assert uniform.objective_seconds > 1.05 * chosen.objective_seconds
    first = chosen.alternatives[0]
    assert (first.mesh, first.step_seconds) == (uniform.mesh, uniform.objective_seconds)
    assert "meshes of the stages' own" in chosen.certificate.search_space
    check(graph, machine, batch)


@pytest.mark.parametrize(
    "asked",
    [{"offload": "optimizer"}, {"num_stages": 3}, {"one_mesh": True}],
)
def test_meshes_of_their_own_are_not_tried_beside_what_they_are_refused_with(
    asked: dict[str, object],
) -> None:
    graph, machine, batch = drawn(44)
    kinds = tuple(replace(kind, host=HOST) for kind in machine.types)
    found = planned(graph, replace(machine, types=kinds), batch, **asked)
    assert found is not None and not found.is_mixed
    assert found.certificate is not None
    assert "own" not in found.certificate.search_space


def test_devices_all_alike_have_one_mesh() -> None:
    found = planned(random_graph(3, 4), cluster(4, 1e9), 32)
    assert found is not None and found.certificate is not None
    assert "own" not in found.certificate.search_space


def test_the_meshes_that_stages_may_have() -> None:
    def texts(machine: Cluster, rows: int) -> set[str]:
        return {format_stage_meshes(meshes) for meshes in unlike_meshes(machine, rows)}

    three = {"data=1/data=2", "data=1/tensor=2", "data=2/data=1", "tensor=2/data=1"}
    assert texts(cluster(3, 1e9), 4) == three
    assert texts(cluster(3, 1e9), 5) == {text for text in three if "data=2" not in text}
    mixed = texts(two_speeds(4, 4, 0.5), 16)
    assert {"data=4/tensor=4", "data=4/data=2/data=2", "data=1/tensor=3/data=4"} <= mixed
    assert "data=4/data=4" not in mixed and len(mixed) < 150
    large = texts(two_speeds(12, 0, 0.5), 1)
    assert large == {"tensor=4/tensor=8", "tensor=8/tensor=4"}


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


def test_stages_are_on_devices_of_one_backend_unless_a_mesh_is_asked_for() -> None:
    """Three devices as fast as each other, one of them a GPU: two of a kind share a stage."""
    machine = two_speeds(1, 2, 1.0, 1e12)
    gpu, other = machine.types
    machine = replace(machine, types=(replace(gpu, backend="cuda"), replace(other, backend="cpu")))
    graph, rows = random_graph(3, 2), 12
    found = plan_graph(graph, machine, batch_size=rows, options=OPTIONS)
    for stage in found.stages:
        backends = {machine.type_of(device).backend for device in stage.devices}
        assert len(backends) == 1, found.mesh_text
    assert found.certificate is not None
    assert "of one backend in each stage" in found.certificate.search_space
    asked = replace(OPTIONS, mesh=Mesh.parse("data=3"))
    assert plan_graph(graph, machine, batch_size=rows, options=asked).mesh.size == 3
    with pytest.raises(UsageError, match="none is searched over devices of several backends"):
        pair = replace(machine, devices=machine.devices[:2])
        plan_graph(graph, pair, batch_size=rows, options=replace(OPTIONS, zero=2))
