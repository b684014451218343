"""Certificates hold where prices depend on sizes and were measured: no plan is below the bound.

Small graphs on devices with random rates by size, costs of kinds of operators and corrections, of
which some fall as the work grows; every plan is enumerated.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from cutset.compiler.ir.cluster import Cluster, OpCost, RateCurve
from cutset.compiler.ir.corrections import Correction, Corrections
from cutset.compiler.ir.graph import Graph
from cutset.cost_models.analysis import batch_values, weight_like_values
from cutset.cost_models.corrections import signature_of
from cutset.passes import stage_layouts

from .joint import best_plan, random_graph
from .layouts.test_choose import cluster
from .test_joint import BATCH, EXACT, LATENCIES, LAYERS, OPTIONS, SPEEDS, searched

FEW = (3, 31, 38, 46, 47, 54, 121)
MANY = 200
_FRACTIONS = (1 / 32, 1 / 4, 1.0)


def points(
    draw: random.Random, least: float, most: float, rate: float
) -> tuple[tuple[float, float], ...]:
    """Rates within a factor of five of `rate`, at sizes from 10 ** least to 10 ** most."""
    sizes = sorted(10 ** draw.uniform(least, most) for _ in range(draw.choice((2, 3, 4))))
    return tuple((size, rate * 10 ** draw.uniform(-0.7, 0.7)) for size in sizes)


def corrections(draw: random.Random, graph: Graph) -> Corrections | None:
    """Factors of some nodes at some sizes of microbatches."""
    batched, weights = batch_values(graph), weight_like_values(graph)
    found = {}
    for node in graph.nodes:
        for fraction in _FRACTIONS:
            if draw.random() < 0.5:
                signature = signature_of(
                    graph, node, batch_fraction=fraction, batched=batched, weights=weights
                )
                factors = (float(f"{10 ** draw.uniform(-0.6, 0.6):.3g}") for _ in range(3))
                found[signature] = Correction(signature, *factors)
    return Corrections(tuple(sorted(found.values(), key=str))) if found else None


def measured(draw: random.Random, machine: Cluster, graph: Graph) -> Cluster:
    """`machine` with figures such as calibration and profiles make, but wilder."""
    kind = machine.types[0]
    what = draw.choice(("curves", "corrections", "both"))
    if what != "corrections":
        memory = RateCurve("memory", "", points(draw, 3, 7, 1e9))
        products = RateCurve("matmul", "f32", points(draw, 4, 9, 1e10))
        costs = tuple(
            OpCost(name, phase, draw.choice((0.5, 1.0, 3.0)), points(draw, 3, 7, 1e9))
            for name in ("elementwise", "relu", "adamw")
            for phase in ("forward", "backward_input")
            if draw.random() < 0.5
        )
        kind = replace(kind, curves=(memory, products), op_costs=costs)
    if what != "curves":
        kind = replace(kind, corrections=corrections(draw, graph))
    return replace(machine, types=(kind,))


def check(seed: int) -> None:
    draw = random.Random(1000 + seed)
    devices = draw.choice((2, 2, 3, 4))
    machine = cluster(devices, draw.choice(SPEEDS), draw.choice(LATENCIES))
    graph = random_graph(seed, LAYERS[devices], plain=devices == 4)
    machine = measured(draw, machine, graph)
    found = searched(graph, machine)
    assert found is not None and found.certificate is not None
    certificate = found.certificate
    best = best_plan(graph, machine, BATCH, OPTIONS, most=certificate.objective)
    if best is not None:  # the enumeration looks past what it takes to be slower
        assert certificate.lower_bound <= best.seconds * (1 + EXACT), (seed, certificate, best)


@pytest.mark.parametrize("seed", FEW)
@pytest.mark.parametrize("is_small", [True, False])
def test_some_graphs(seed: int, is_small: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage_layouts, "_FEW_CLASSES", 32 if is_small else 0)
    check(seed)


@pytest.mark.slow
def test_many_graphs() -> None:
    for seed in range(MANY):
        check(seed)
