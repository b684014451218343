"""Known models are found again from noisy measurements."""

from __future__ import annotations

import random

import pytest

from cutset.cost_models.fits import Quality, Sample, fit_line, fit_link, left_out, rates_by_size

LATENCY, BYTES_PER_SECOND = 9e-5, 2.5e9
SIZES = [float(1 << power) for power in range(10, 27, 2)]


def messages(noise: float, seed: int, outliers: int = 0) -> list[Sample]:
    """Three messages of each size; `outliers` of all took up to five times as long."""
    draw = random.Random(seed)
    samples = []
    for size in SIZES * 3:
        seconds = (LATENCY + size / BYTES_PER_SECOND) * (1.0 + draw.uniform(-noise, noise))
        samples.append(Sample(1.0, size, seconds))
    for position in draw.sample(range(len(samples)), outliers):
        old = samples[position]
        samples[position] = Sample(old.first, old.second, old.seconds * draw.uniform(2.0, 5.0))
    return samples


def test_an_exact_line_is_found_exactly() -> None:
    link, quality = fit_link(messages(0.0, 0), "exact")
    assert link.latency_seconds == pytest.approx(LATENCY, rel=1e-6)
    assert link.bytes_per_second == pytest.approx(BYTES_PER_SECOND, rel=1e-6)
    assert quality.worst_error < 1e-6 and quality.samples == 27


@pytest.mark.parametrize("seed", range(5))
def test_noise_of_five_percent_moves_the_figures_by_less(seed: int) -> None:
    link, quality = fit_link(messages(0.05, seed), "noisy")
    assert link.latency_seconds == pytest.approx(LATENCY, rel=0.05)
    assert link.bytes_per_second == pytest.approx(BYTES_PER_SECOND, rel=0.05)
    assert 0.0 < quality.median_error <= quality.worst_error < 0.11


@pytest.mark.parametrize("seed", range(5))
def test_outliers_count_little(seed: int) -> None:
    link, quality = fit_link(messages(0.02, seed, outliers=4), "disturbed")
    assert link.latency_seconds == pytest.approx(LATENCY, rel=0.06)
    assert link.bytes_per_second == pytest.approx(BYTES_PER_SECOND, rel=0.06)
    assert quality.median_error < 0.04 and quality.worst_error > 0.4


def test_coefficients_are_not_negative() -> None:
    """Measured times that fall with the size would ask for a bandwidth below zero."""
    falling = [Sample(1.0, size, 1e-3 - 1e-12 * size) for size in SIZES]
    line = fit_line(falling, "falling")
    assert line.a == pytest.approx(1e-3, rel=0.05) and line.b == 0.0
    rising = fit_line([Sample(1.0, size, 2 * size) for size in SIZES], "rising")
    assert rising.a == pytest.approx(0.0, abs=1e-6) and rising.b == pytest.approx(2.0)


def test_a_link_that_only_waits_has_a_finite_bandwidth() -> None:
    link, _ = fit_link([Sample(1.0, size, 1e-5) for size in SIZES], "waiting")
    assert link.latency_seconds == pytest.approx(1e-5)
    assert link.bytes_per_second == pytest.approx(4 * max(SIZES) / 1e-5)


def test_ring_steps_of_groups_of_several_sizes_are_one_link() -> None:
    """2 (p - 1) steps of n / p bytes each, over 2 and over 4 ranks."""
    samples = []
    for ranks in (2, 4):
        steps = 2.0 * (ranks - 1)
        for size in SIZES:
            seconds = steps * (LATENCY + size / ranks / BYTES_PER_SECOND)
            samples.append(Sample(steps, steps * size / ranks, seconds))
    link, _ = fit_link(samples, "all_reduce")
    assert link.latency_seconds == pytest.approx(LATENCY, rel=1e-6)
    assert link.bytes_per_second == pytest.approx(BYTES_PER_SECOND, rel=1e-6)


def test_rates_leave_the_overhead_out() -> None:
    samples = [(size, 1e-5 + size / 5e9) for size in (1e4, 1e6, 1e8)] * 2 + [(1e8, 9.0)]
    points = rates_by_size(samples, 1e-5)
    # of the smallest, most is overhead
    assert [size for size, _ in points] == [1e6, 1e8]
    assert all(rate == pytest.approx(5e9) for _, rate in points)
    assert rates_by_size(samples[:1], 1e-5) == ((1e4, pytest.approx(1e4 / 6e-6)),)


def test_a_size_that_was_left_out_tells_how_good_a_curve_is() -> None:
    level = [(size, size / 5e9) for size in (1e4, 1e5, 1e6, 1e7)]
    assert left_out(level, 0.0, "level").worst_error < 1e-9
    bumpy = [*level[:2], (1e6, 1e6 / 1e9), level[3]]
    quality = left_out(bumpy, 0.0, "bumpy")
    # the slow size is taken to be five times as fast; the one beside it gets the mean of both
    assert quality.samples == 2
    assert quality.worst_error == pytest.approx(5**0.5 - 1)
    assert quality.median_error == pytest.approx((5**0.5 - 1 + 0.8) / 2)


@pytest.mark.parametrize("count", [1, 2])
def test_nothing_tells_how_good_a_curve_of_one_or_two_sizes_is(count: int) -> None:
    sizes = (1e5, 1e6)[:count]
    assert left_out([(n, n / 5e9) for n in sizes], 0.0, "few") == Quality("few", 0, None, None)


def test_quality_is_relative_to_what_was_measured() -> None:
    assert Quality.of("q", [(1.1, 1.0), (2.0, 2.0), (1.0, 2.0)]) == Quality(
        "q", 3, pytest.approx(0.1), 0.5
    )
