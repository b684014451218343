"""Certificates hold where devices, links or memory are uneven: no plan is below the bound.

Devices of two types under a pinned mesh, gathers that are far faster than sums, pipelines that are
short of memory, transfers that computation hinders; every plan is enumerated.
"""

from __future__ import annotations

import contextlib
import random
from dataclasses import replace

import pytest

from cutset.compiler.ir.cluster import HANDLED, Cluster, Link, LinkRule
from cutset.compiler.ir.errors import InfeasibleError
from cutset.compiler.ir.graph import Graph, Mode
from cutset.compiler.ir.mesh import Mesh
from cutset.compiler.ir.plan import Certificate
from cutset.cost_models.presets import limit_memory
from cutset.passes.context import PlanOptions
from cutset.passes.pipeline import plan_graph
from tests.ir.builders import GraphBuilder

from .joint import best_plan, random_graph
from .layouts.test_choose import cluster
from .test_joint import EXACT

MIXED = (1, 12, 28)
SHORT = (4, 41)
HINDERED = (0, 7, 23)
MANY = 30
FACTORS = (0.1, 0.3, 3.0, 10.0)
SHARES = (0.3, 0.45, 0.6, 0.7, 0.8, 0.9)


def drawn(seed: int, devices: tuple[int, ...]) -> tuple[random.Random, Cluster, Graph, int]:
    """Devices, a graph and a batch."""
    draw = random.Random(seed * 13 + 5)
    count = draw.choice(devices)
    machine = cluster(count, draw.choice((1e8, 1e9, 1e11)), draw.choice((1e-7, 1e-5)))
    graph = random_graph(seed, draw.choice((3, 4, 5)) if count == 2 else 4)
    return draw, machine, graph, draw.choice((32, 64))


def holds(
    graph: Graph, machine: Cluster, batch: int, options: PlanOptions, proof: Certificate | None
) -> bool:
    """Whether no plan is below the bound of `proof`; the enumeration looks past what it takes to be
    slower than what was found."""
    assert proof is not None
    best = best_plan(graph, machine, batch, options, most=proof.objective)
    return best is None or proof.lower_bound <= best.seconds * (1 + EXACT)


def check_mixed(seed: int) -> None:
    draw, machine, graph, batch = drawn(seed, (2,))
    mesh = draw.choice(("pipeline=2", "data=2", "tensor=2"))
    if mesh != "pipeline=2":
        graph = random_graph(seed, 2)
    factor, kind = draw.choice(FACTORS), machine.types[0]
    other = replace(
        kind,
        name="other",
        flops_per_second=tuple((name, factor * rate) for name, rate in kind.flops_per_second),
        memory_bytes_per_second=factor * kind.memory_bytes_per_second,
    )
    devices = machine.devices[0], replace(machine.devices[1], type="other")
    machine = replace(machine, types=(kind, other), devices=devices)
    options = PlanOptions(
        recompute="none",
        offload="none",
        mesh=Mesh.parse(mesh),
        zero=1 if mesh == "data=2" else None,  # the enumeration has ZeRO 3 that gathers nothing
    )
    plan = plan_graph(graph, machine, batch_size=batch, options=options)
    assert holds(graph, machine, batch, options, plan.certificate)


def check_short(seed: int) -> None:
    _, machine, graph, batch = drawn(seed, (2, 3))
    mesh = Mesh.parse(f"pipeline={len(machine.devices)}")
    options = PlanOptions(offload="none", mesh=mesh)
    plan = plan_graph(graph, machine, batch_size=batch, options=options)
    assert plan.prediction is not None
    most = max(entry.total_bytes for entry in plan.prediction.memory)
    for share in SHARES:
        small = limit_memory(machine, int(share * most))
        with contextlib.suppress(InfeasibleError):
            plan, machine = plan_graph(graph, small, batch_size=batch, options=options), small
            break
    assert holds(graph, machine, batch, options, plan.certificate)


def _handled(seconds: float, rate: float) -> tuple[tuple[str, Link], ...]:
    return tuple((name, Link(seconds, rate)) for name in HANDLED)


def check_hindered(seed: int) -> None:
    draw, machine, graph, batch = drawn(seed, (2, 3))
    kept, latency = draw.choice((0.02, 0.3, 0.9)), machine.links[0].link.latency_seconds
    rule = replace(
        machine.links[0],
        progress_share=kept,
        compute_share=draw.choice((0.0, 0.4, 1.0)),
        skew_seconds=draw.choice((0.0, 1.0, 20.0)) * latency,
        collectives=(("all_reduce", Link(draw.choice((1.0, 30.0)) * latency, 1e9)),),
        handling=draw.choice(((), _handled(1e-3, 1e12), _handled(latency, 1e9))),
    )
    backend = "cpu" if rule.handling else machine.types[0].backend
    kinds = tuple(replace(kind, backend=backend) for kind in machine.types)
    machine = replace(machine, links=(rule,), types=kinds)
    options = PlanOptions(recompute="none", offload="none")
    plan = plan_graph(graph, machine, batch_size=batch, options=options)
    assert holds(graph, machine, batch, options, plan.certificate)


@pytest.mark.parametrize("seed", MIXED)
def test_devices_of_two_types(seed: int) -> None:
    check_mixed(seed)


@pytest.mark.parametrize("seed", SHORT)
def test_pipelines_short_of_memory(seed: int) -> None:
    check_short(seed)


@pytest.mark.parametrize("seed", HINDERED)
def test_transfers_that_computation_hinders(seed: int) -> None:
    check_hindered(seed)


@pytest.mark.slow
@pytest.mark.parametrize("check", [check_mixed, check_short, check_hindered])
def test_many_graphs(check: object) -> None:
    assert callable(check)
    for seed in range(MANY):
        check(seed)


def test_gathers_that_are_faster_than_sums() -> None:
    """ZeRO 3 is found, and bounds count with it."""
    build = GraphBuilder("products", Mode.TRAIN)
    value = build.input("x", (32, 512))
    for number in range(2):
        weight = build.parameter(f"w{number}", (512, 512))
        value = build.op("aten.linear.default", value, weight)
    build.loss(build.op("aten.sum.default", value))
    graph, machine = build.build(), cluster(2, 1e7, 1e-6)
    fast = Link(1e-8, 1e11)
    rule = LinkRule(
        machine.links[0].link, collectives=(("all_gather", fast), ("reduce_scatter", fast))
    )
    machine = replace(machine, links=(rule,))
    options = PlanOptions(
        recompute="none", offload="none", mesh=Mesh.parse("data=2"), num_microbatches=1
    )
    plan = plan_graph(graph, machine, batch_size=4096, options=options)
    pinned = plan_graph(graph, machine, batch_size=4096, options=replace(options, zero=3))
    assert plan.zero_level == 3
    assert plan.certificate is not None and pinned.certificate is not None
    assert plan.certificate.objective == pinned.certificate.objective
    assert plan.certificate.lower_bound <= pinned.certificate.objective
