"""Predicts how long a stream takes whose pieces do not take equally long each time.

Devices run their pieces in a fixed order, so where pieces of several devices wait for each other, a
piece that takes long makes others late, the more the shorter and the more numerous they are. The
time of a piece is taken as a gamma process: what delays work comes anywhere in it, in independent
parts of it independently. With v, the variance of the time of work over its mean, a piece of t
seconds takes Gamma(t / v, v): t in the mean, with variance v t. A piece of 0.2 ms is so, measured
by itself, far less steady than one of 20 ms. v is estimated on runs of many operators, where it is
known best.

The expectation is the mean of some streams with random times, the same for every order.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence

from ...compiler.ir.schedule import Schedule

__all__ = ["After", "Times", "expected_seconds", "random_times", "replayed_seconds"]

_DRAWS = 8
_SEED = 0

Times = Sequence[Sequence[float]]
"""Seconds by microbatch and piece."""

After = Sequence[Sequence[tuple[int, float]]]
"""Of every piece, those that wait for it, and seconds on the way."""


def random_times(
    seconds: Sequence[float], unsteady: Sequence[float], num_microbatches: int
) -> list[Times]:
    """Of some streams.

    Args:
        seconds: of every piece, one microbatch, in the mean.
        unsteady: of every piece, variance of its time over its mean, in seconds.
    """
    draw = random.Random(_SEED)

    def one(mean: float, grain: float) -> float:
        return draw.gammavariate(mean / grain, grain) if mean > 0.0 and grain > 0.0 else mean

    return [
        [
            [one(mean, grain) for mean, grain in zip(seconds, unsteady, strict=True)]
            for _ in range(num_microbatches)
        ]
        for _ in range(_DRAWS)
    ]


def expected_seconds(schedule: Schedule, after: After, streams: Sequence[Times]) -> float:
    """Mean duration of `streams`, each device in the order of the schedule."""
    return statistics.mean(replayed_seconds(schedule, after, times) for times in streams)


def replayed_seconds(schedule: Schedule, after: After, times: Times) -> float:
    """Duration of one stream: every piece starts when the one before it on its device has ended and
    its inputs are there."""
    home = {action.stage: rank for rank, actions in enumerate(schedule.ranks) for action in actions}
    inputs = [0] * len(after)
    for targets in after:
        for target, _ in targets:
            inputs[target] += 1
    missing = [list(inputs) for _ in times]
    ready = [[0.0] * len(after) for _ in times]
    free = [0.0] * len(schedule.ranks)
    position = [0] * len(schedule.ranks)
    waiting = list(range(len(schedule.ranks)))  # ranks that may be able to go on
    while waiting:
        rank = waiting.pop()
        for action in schedule.ranks[rank][position[rank] :]:
            piece, microbatch = action.stage, action.microbatch
            if missing[microbatch][piece]:
                break
            position[rank] += 1
            free[rank] = max(free[rank], ready[microbatch][piece]) + times[microbatch][piece]
            for target, delay in after[piece]:
                missing[microbatch][target] -= 1
                arrival = free[rank] + delay
                ready[microbatch][target] = max(ready[microbatch][target], arrival)
                if not missing[microbatch][target] and home[target] != rank:
                    waiting.append(home[target])
    return max(free)
