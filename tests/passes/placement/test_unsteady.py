"""Streams whose pieces take now more, now less: what many short pieces lose, and few long ones."""

from __future__ import annotations

import random
import statistics

import pytest

from cutset.passes.placement.stream import stream_schedule
from cutset.passes.placement.unsteady import random_times, replayed_seconds

Line = tuple[list[int], list[float], dict[tuple[int, int], float]]


def there_and_back(turns: int) -> Line:
    """Two devices that have one second of work a microbatch each, in so many pieces in turn."""
    devices = [0, 1] * turns
    return devices, [1.0 / turns] * len(devices), {(i, i + 1): 0.0 for i in range(len(devices) - 1)}


def seconds(line: Line, unsteady: float, count: int = 40) -> float:
    devices, times, edges = line
    return stream_schedule(
        devices=devices,
        seconds=times,
        edges=edges,
        num_microbatches=count,
        unsteady=[unsteady] * len(devices),
    ).seconds


def test_times_have_the_mean_and_variance_that_are_asked_for() -> None:
    pieces, grains = [0.5, 2.0, 0.0, 3.0], [0.1, 0.1, 0.1, 0.0]
    streams = random_times(pieces, grains, 500)
    for piece, (mean, grain) in enumerate(zip(pieces, grains, strict=True)):
        found = [row[piece] for times in streams for row in times]
        assert statistics.mean(found) == pytest.approx(mean, rel=0.05)
        assert statistics.pvariance(found) == pytest.approx(mean * grain, rel=0.15)
    assert streams == random_times(pieces, grains, 500)


@pytest.mark.parametrize("seed", range(20))
def test_steady_pieces_take_no_longer_than_in_the_run_that_made_the_order(seed: int) -> None:
    draw = random.Random(seed)
    count = draw.randrange(2, 12)
    times = [draw.choice([0.25, 1.0, 2.0]) for _ in range(count)]
    edges = {(a, b): 0.1 for b in range(count) for a in range(b) if draw.random() < 0.3}
    devices = [draw.randrange(3) for _ in range(count)]
    run = stream_schedule(devices=devices, seconds=times, edges=edges, num_microbatches=7)
    after = [[(b, delay) for (a, b), delay in edges.items() if a == i] for i in range(count)]
    replayed = replayed_seconds(run.schedule, after, [times] * 7)
    busiest = max(sum(t for t, d in zip(times, devices, strict=True) if d == k) for k in range(3))
    assert 7 * busiest - 1e-9 <= replayed <= run.seconds + 1e-9


def test_many_short_pieces_lose_more_than_few_long_ones() -> None:
    few, many = there_and_back(1), there_and_back(16)
    assert seconds(many, 0.0) == pytest.approx(seconds(few, 0.0), rel=0.03)
    lost = [seconds(line, 0.1) / seconds(line, 0.0) for line in (few, many)]
    assert lost[1] > lost[0] + 0.03
    assert seconds(many, 0.4) > seconds(many, 0.1)
