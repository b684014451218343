"""Models fitted to measurements: lines with two positive coefficients, and rates by size.

All fits are least squares on relative errors, as a microsecond of a small message counts like a
millisecond of a large one, made robust by iterated reweighting: what lies far off the model counts
less (Huber, Robust Estimation of a Location Parameter, 1964; Holland and Welsch, Robust Regression
Using Iteratively Reweighted Least-Squares, 1977).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from ..compiler.ir.cluster import Link, RateCurve

__all__ = ["Line", "Quality", "Sample", "fit_line", "fit_link", "left_out", "rates_by_size"]

_ROUNDS = 30
_HUBER = 1.345  # in units of the errors' scale: 95 % as efficient as least squares without outliers
_NORMAL = 1.4826  # median absolute deviation to standard deviation
_LEAST_SCALE = 0.005  # relative: below that, errors are rounding
_MOST_OVER_SEEN = 4.0  # a bandwidth, over that of the best whole transfer


@dataclass(frozen=True, slots=True)
class Sample:
    """A measurement of `first * a + second * b` seconds."""

    first: float
    second: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Quality:
    """How well a model describes the measurements that it was fitted to.

    Args:
        name: what was fitted.
        samples: how many measurements.
        median_error, worst_error: relative to what was measured; None without measurements.
    """

    name: str
    samples: int
    median_error: float | None
    worst_error: float | None

    @staticmethod
    def of(name: str, pairs: Sequence[tuple[float, float]]) -> Quality:
        """Of (predicted, measured) pairs."""
        errors = [abs(predicted - measured) / measured for predicted, measured in pairs]
        if not errors:
            return Quality(name, 0, None, None)
        return Quality(name, len(errors), statistics.median(errors), max(errors))


@dataclass(frozen=True, slots=True)
class Line:
    """Coefficients of `seconds = a first + b second`, neither below zero."""

    a: float
    b: float
    quality: Quality


def fit_line(samples: Sequence[Sample], name: str) -> Line:
    """The coefficients that describe `samples` best; `name` is for the quality."""
    weights = [1.0] * len(samples)
    a = b = 0.0
    for _ in range(_ROUNDS):
        before = a, b
        a, b = _weighted(samples, weights)
        errors = [(a * s.first + b * s.second) / s.seconds - 1.0 for s in samples]
        scale = max(_NORMAL * statistics.median(map(abs, errors)), _LEAST_SCALE)
        weights = [min(1.0, _HUBER * scale / max(abs(error), 1e-12)) for error in errors]
        if math.isclose(a, before[0], rel_tol=1e-9) and math.isclose(b, before[1], rel_tol=1e-9):
            break
    pairs = [(a * s.first + b * s.second, s.seconds) for s in samples]
    return Line(a, b, Quality.of(name, pairs))


def _weighted(samples: Sequence[Sample], weights: Sequence[float]) -> tuple[float, float]:
    """Minimises the weighted squares of relative errors over coefficients that are not negative."""
    rows = [(s.first / s.seconds, s.second / s.seconds) for s in samples]
    xx = math.fsum(w * x * x for w, (x, _) in zip(weights, rows, strict=True))
    xy = math.fsum(w * x * y for w, (x, y) in zip(weights, rows, strict=True))
    yy = math.fsum(w * y * y for w, (_, y) in zip(weights, rows, strict=True))
    x1 = math.fsum(w * x for w, (x, _) in zip(weights, rows, strict=True))
    y1 = math.fsum(w * y for w, (_, y) in zip(weights, rows, strict=True))
    determinant = xx * yy - xy * xy
    if determinant > 1e-12 * xx * yy:
        a, b = (x1 * yy - y1 * xy) / determinant, (y1 * xx - x1 * xy) / determinant
        if a >= 0.0 and b >= 0.0:
            return a, b
    only_a, only_b = (x1 / xx if xx else 0.0), (y1 / yy if yy else 0.0)
    # of the two ends of the legal range, the one with less error
    return (only_a, 0.0) if only_a * x1 >= only_b * y1 else (0.0, only_b)


def fit_link(samples: Sequence[Sample], name: str) -> tuple[Link, Quality]:
    """Latency and bandwidth of a link.

    Args:
        samples: how many times the latency counts, and how many bytes go one after the other.
    """
    line = fit_line(samples, name)
    # where times do not grow with sizes, that much is known of the bandwidth
    slope = max(line.b, min(s.seconds / s.second for s in samples) / _MOST_OVER_SEEN)
    return Link(line.a, 1.0 / slope), line.quality


def rates_by_size(
    samples: Sequence[tuple[float, float]], overhead_seconds: float
) -> tuple[tuple[float, float], ...]:
    """(size, size per second) for the sizes that were measured, ascending.

    Sizes of which the overhead is more than half of the time say little about a rate and are left
    out, but for the largest.

    Args:
        samples: (size, seconds with the overhead); of equal sizes the median counts.
        overhead_seconds: what an operator takes however small it is.
    """
    by_size: dict[float, list[float]] = {}
    for size, seconds in samples:
        by_size.setdefault(size, []).append(seconds)
    medians = [(size, statistics.median(found)) for size, found in sorted(by_size.items())]
    telling = [(n, t) for n, t in medians if t >= 2 * overhead_seconds] or medians[-1:]
    return tuple((n, n / max(t - overhead_seconds, t / 2)) for n, t in telling)


def left_out(samples: Sequence[tuple[float, float]], overhead_seconds: float, name: str) -> Quality:
    """How well a curve through all other sizes predicts each size between them.

    That is what a size that was not measured may be off by. Two sizes have none between them.

    Args:
        samples, overhead_seconds: as for `rates_by_size`.
    """
    points = rates_by_size(samples, overhead_seconds)
    pairs = []
    for position in range(1, len(points) - 1):
        size, rate = points[position]
        curve = RateCurve("memory", "", (*points[:position], *points[position + 1 :]))
        pairs.append((size / curve.at(size) + overhead_seconds, size / rate + overhead_seconds))
    return Quality.of(name, pairs)
