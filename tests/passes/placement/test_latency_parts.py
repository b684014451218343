"""Parts of the search for latency by themselves, and graphs too large for brute force."""

from __future__ import annotations

import random

import pytest

from cutset.compiler.ir.errors import InfeasibleError
from cutset.compiler.ir.workload import DeviceKind, Operator, Workload
from cutset.cost_models.placement import latency, piece_latency, violations
from cutset.passes.placement.baselines import BASELINES, place_baseline
from cutset.passes.placement.latency import place_latency
from cutset.passes.placement.latency_bounds import latency_bound
from cutset.passes.placement.latency_lists import ListScheduler, single_pieces, whole_pieces
from cutset.passes.placement.latency_pieces import joined_pieces
from cutset.passes.placement.latency_problem import latency_problem

from .latency_brute import placements, random_latency_workload


def layered(size: int, devices: int, seed: int = 0, *, transfer: float = 0.3) -> Workload:
    """Layers of ten operators, each reading one to three of the layer before."""
    rng = random.Random(seed)
    operators = []
    for v in range(size):
        time = rng.uniform(0.5, 2.0)
        supported = time if v % 17 else None
        operators.append(
            Operator(f"v{v}", (time * 8, supported), (0.0, transfer), float(rng.randint(1, 9)))
        )
    edges = {
        ((v // 10 - 1) * 10 + rng.randrange(10), v)
        for v in range(10, size)
        for _ in range(rng.randint(1, 3))
    }
    memory = 1.5 * sum(operator.size for operator in operators) / devices
    kinds = (DeviceKind("host", 1, concurrent=True), DeviceKind("machine", devices, memory=memory))
    return Workload(kinds, tuple(operators), tuple(sorted(edges)))


@pytest.mark.parametrize("contiguous", [True, False])
def test_larger_graphs_get_legal_placements_in_time(contiguous: bool) -> None:
    work = layered(300, 4)
    told: list[tuple[float, float]] = []
    result = place_latency(
        work,
        contiguous=contiguous,
        time_limit=4,
        gap=0.01,
        progress=lambda value, bound: told.append((value, bound)),
    )
    assert violations(work, result.placement) == ()
    if result.pieces is None:
        assert result.value == latency(work, result.placement)
    else:
        assert result.value == piece_latency(work, result.placement, result.pieces)
    assert latency_bound(latency_problem(work)) <= result.lower_bound <= result.value
    values, bounds = zip(*told, strict=True)
    assert list(values) == sorted(values, reverse=True)
    assert list(bounds) == sorted(bounds)
    for method in BASELINES[:2]:
        baseline = place_baseline(
            work, method, objective="latency", contiguous=contiguous, time_limit=1
        )
        assert result.value <= baseline.value


def test_free_pieces_use_what_one_piece_leaves_idle() -> None:
    work = layered(120, 3, transfer=0.05)
    values = [
        place_latency(work, contiguous=contiguous, time_limit=4, gap=0.01).value
        for contiguous in (True, False)
    ]
    assert values[1] < 0.8 * values[0]


def test_many_groups_fall_back_on_coarse_programs() -> None:
    work = layered(1200, 24)
    result = place_latency(work, contiguous=True, time_limit=6, gap=0.0)
    assert violations(work, result.placement) == ()
    assert result.value == latency(work, result.placement)
    assert result.seconds < 20


def test_small_results_repeat() -> None:
    seeds = [seed for seed in range(12) if any(placements(random_latency_workload(seed)))]
    assert len(seeds) > 6
    for seed in seeds:
        work = random_latency_workload(seed)
        results = [place_latency(work, contiguous=False, time_limit=30, gap=0) for _ in range(2)]
        assert results[0].value == results[1].value
        assert results[0].lower_bound == results[1].lower_bound


def test_list_schedules_run_in_their_order() -> None:
    for seed in range(30):
        work = random_latency_workload(seed)
        problem = latency_problem(work)
        for placement in list(placements(work))[:20]:
            order = ListScheduler(problem).order(placement)
            assert sorted(order) == list(range(len(work.operators)))
            pieces = single_pieces(problem, placement, order)
            value = piece_latency(work, placement, pieces)
            assert value is not None
            joined = joined_pieces(work, placement, pieces)
            assert len(joined) <= len(pieces)
            assert piece_latency(work, placement, joined) == pytest.approx(value, rel=1e-9)
            whole = whole_pieces(problem, placement)
            contiguous = latency(work, placement)
            assert (whole is None) == (contiguous is None)
            if whole is not None:
                assert piece_latency(work, placement, whole) == pytest.approx(contiguous)


def test_colours_that_no_device_can_hold_together() -> None:
    kinds = (DeviceKind("a", 1, memory=10.0), DeviceKind("b", 1, memory=10.0))
    operators = tuple(
        Operator(f"v{v}", (1.0, 1.0), (0.0, 0.0), size=6.0, colour="tied") for v in range(2)
    )
    with pytest.raises(InfeasibleError, match="12 bytes"):
        place_latency(Workload(kinds, operators, ()), contiguous=True, time_limit=5, gap=0)


def test_pieces_that_can_only_be_several() -> None:
    """Two machines of unlike support: the chain has to go to and fro."""
    kinds = (DeviceKind("a", 1), DeviceKind("b", 1))
    operators = (
        Operator("x", (1.0, None), (0.5, 0.5)),
        Operator("y", (None, 1.0), (0.5, 0.5)),
        Operator("z", (1.0, None), (0.5, 0.5)),
    )
    work = Workload(kinds, operators, ((0, 1), (1, 2)))
    with pytest.raises(InfeasibleError, match="several pieces a device: --non-contiguous"):
        place_latency(work, contiguous=True, time_limit=5, gap=0)
    result = place_latency(work, contiguous=False, time_limit=5, gap=0)
    assert result.placement == (0, 1, 0)
    assert result.pieces == ((0,), (1,), (2,))
    assert result.value == pytest.approx(5.0)
