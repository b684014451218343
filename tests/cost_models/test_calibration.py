"""From made-up times of a device that is known to its figures."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from cutset.compiler.ir.cluster import DeviceType, OpCost, RateCurve
from cutset.cost_models.calibration import (
    Beside,
    OpTime,
    calls,
    collective_sample,
    fitted_curve,
    fitted_link,
    fitted_op_costs,
    fitted_optimizer,
    overlap_shares,
    rounded,
    seconds_of_all,
    skew_seconds,
    streams,
    with_curves,
)

OVERHEAD = 2e-6
BASE = DeviceType("cpu", "cpu", 1 << 30, 1e9, (("f32", 1e9),), OVERHEAD)
MEMORY = RateCurve("memory", "", ((1e4, 4e10), (1e8, 1e10)))


def noise(seed: int, spread: float = 0.03) -> float:
    return 1.0 + random.Random(seed).uniform(-spread, spread)


def test_overhead_is_what_each_operator_adds() -> None:
    one, many = 5e-6 + OVERHEAD, 5e-6 + 33 * OVERHEAD
    assert calls(one, many, 33) == (pytest.approx(OVERHEAD), pytest.approx(5e-6))
    assert calls(1e-5, 1e-5, 33)[0] > 0.0


def test_a_curve_is_found_again() -> None:
    true = RateCurve("matmul", "f32", ((1e6, 2e10), (1e8, 6e10), (1e9, 7e10)))
    samples = [
        (size, (size / true.at(size) + OVERHEAD) * noise(seed))
        for size, _ in true.points
        for seed in range(3)
    ]
    curve, quality = fitted_curve("matmul", "f32", samples, OVERHEAD)
    for size in (1e6, 1e7, 1e8, 1e9):
        assert curve.at(size) == pytest.approx(true.at(size), rel=0.05)
    assert quality.name == "matmul f32" and quality.samples == 1


def test_sustained_rates_are_those_of_the_largest_and_the_fastest() -> None:
    slow_end = RateCurve("matmul", "bf16", ((1e6, 5e10), (1e9, 4e10)))
    kind = with_curves(BASE, [MEMORY, slow_end])
    assert kind.memory_bytes_per_second == 1e10
    assert kind.flops_per_second == (("f32", 1e9), ("bf16", 5e10))
    again = with_curves(kind, [replace(slow_end, dtype="f32")])
    assert again.flops_per_second == (("f32", 5e10), ("bf16", 5e10))
    assert kind.rate(torch.bfloat16, 1e9) == 4e10
    assert with_curves(BASE, []) == BASE


def times(name: str, phase: str, kernels: float, rate: float, seed: int) -> list[OpTime]:
    sizes = (3e3, 1e6, 1e7, 1e8)
    return [
        OpTime(name, phase, n, (kernels * OVERHEAD + n / rate) * noise(seed + i))
        for i, n in enumerate(sizes)
    ]


def test_costs_of_operators_are_found_again() -> None:
    measured = [
        *times("elementwise", "forward", 1.0, 2e10, 0),
        *times("norm", "forward", 2.0, 5e9, 4),
        *times("norm", "backward_input", 3.0, 2e9, 8),
        *times("random", "forward", 31.0, 1e9, 12),
        *times("random", "backward_input", 2.0, 8e9, 16),
    ]
    costs, qualities = fitted_op_costs(with_curves(BASE, [MEMORY]), measured)
    table = {(cost.name, cost.phase): cost for cost in costs}
    assert len(qualities) == len(costs) == 5
    assert max(quality.worst_error for quality in qualities) < 0.15
    for key, kernels, rate in (
        (("elementwise", "forward"), 1.0, 2e10),
        (("norm", "forward"), 2.0, 5e9),
        (("norm", "backward_input"), 3.0, 2e9),
        (("dropout", "backward_input"), 2.0, 8e9),
        # drawing is what a dropout takes beside an elementwise operator
        (("random", "forward"), 30.0, 1.0 / (1.0 / 1e9 - 1.0 / 2e10)),
    ):
        assert table[key].kernels == pytest.approx(kernels, rel=0.3)
        assert BASE.op_rate(table[key], 1e7) == pytest.approx(rate, rel=0.08)


def test_an_optimizer_is_an_operator_on_what_it_moves() -> None:
    samples = [(n, 5 * OVERHEAD + n / 3e10) for n in (1e3, 1e6, 1e7, 1e8)]
    cost, quality = fitted_optimizer(BASE, "adamw", samples)
    assert (cost.name, cost.phase) == ("adamw", "forward")
    assert cost.kernels == pytest.approx(5.0, rel=0.05)
    assert BASE.op_rate(cost, 1e8) == pytest.approx(3e10, rel=0.02)
    assert quality.worst_error < 0.1


def test_a_convolution_at_the_rate_of_memory_has_no_points() -> None:
    kind = with_curves(BASE, [MEMORY])
    assert kind.op_rate(OpCost("convolution", "forward", 1.0), 1e8) == 1e10


def test_collectives_are_steps_of_rings() -> None:
    samples = [
        collective_sample("all_reduce", ranks, n, 2 * (ranks - 1) * (1e-4 + n / ranks / 2e9))
        for ranks in (2, 4)
        for n in (1e3, 1e5, 1e7)
    ]
    link, _ = fitted_link(samples, "all_reduce")
    assert link.latency_seconds == pytest.approx(1e-4) and link.bytes_per_second == 2e9
    gather = collective_sample("all_gather", 4, 8e6, 1.0)
    assert (gather.first, gather.second) == (3.0, 6e6)


def test_messages_at_once() -> None:
    assert streams(1.0, 1.0, 2) is None and streams(1.0, 1.05, 2) is None
    assert streams(1.0, 2.0, 2) == 1.0 and streams(1.0, 1.6, 4) == 2.5


def _beside(taken: float, kept: float, transfers: float, computing: float) -> Beside:
    """Both started together: fluid, event by event."""
    computed = computing + taken * transfers
    if transfers / kept <= computed:
        return Beside(transfers, computing, computed, computed)
    computed = computing / (1 - taken * kept)
    return Beside(transfers, computing, computed, computed + transfers - kept * computed)


@pytest.mark.parametrize(("taken", "kept"), [(0.0, 1.0), (0.4, 0.5), (0.8, 0.2), (0.31, 0.97)])
def test_the_shares_that_transfers_take_and_keep(taken: float, kept: float) -> None:
    rows = [_beside(taken, kept, 0.01, 0.01 * longer) for longer in (0.5, 1.0, 3.0, 9.0)]
    assert overlap_shares(rows) == pytest.approx((taken, kept))
    # one measurement that the machine disturbed is outvoted
    assert overlap_shares([*rows, Beside(0.01, 0.01, 0.5, 0.9)]) == pytest.approx((taken, kept))


def test_shares_that_nothing_tells_are_the_harmless_ones() -> None:
    assert overlap_shares([]) == (0.0, 1.0)
    assert overlap_shares([Beside(0.01, 0.02, 0.02, 0.02)]) == (0.0, 1.0)
    assert overlap_shares([Beside(0.01, 0.02, 0.019, 0.019)]) == (0.0, 1.0)
    # all of the rate can never be taken: both would stand still
    taken, kept = overlap_shares([Beside(0.01, 0.02, 0.5, 0.5)])
    assert taken * kept <= 0.9


def test_a_collective_begins_when_the_last_rank_reaches_it() -> None:
    times = [(1.0, 4.0), (3.0, 3.5)]
    assert seconds_of_all(times, shared=True) == pytest.approx(0.75)
    assert seconds_of_all(times, shared=False) == pytest.approx(0.5)
    assert seconds_of_all([(1.0, 2.0), (5.0, 5.1)], shared=True) == 0.0  # one did not wait


def test_the_last_is_later_by_the_median() -> None:
    assert skew_seconds([1e-4, 3e-4, 2e-4]) == pytest.approx(2e-4)
    assert skew_seconds([]) == skew_seconds([-1e-6]) == 0.0


def test_four_digits() -> None:
    assert rounded(123456.0) == 123500.0 and rounded(1.23456e-7) == 1.235e-7
