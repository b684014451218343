"""Seconds of a step's sums of gradients that no computation hides.

The weight gradients of a stage's last microbatch are computed in parts, and the sums of what a part
completes travel while the next ones compute (`compiler/codegen/tail.py`): what is still under way
when they are all done is exposed. A bucket waits until it is full, and it is one of eight
(`compiler/ir/buckets.py`), so that an eighth of the sums is taken to be exposed at least.
"""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["LEAST_EXPOSED", "exposed_seconds"]

LEAST_EXPOSED = 1 / 8


def exposed_seconds(parts: Iterable[tuple[float, float]]) -> float:
    """Seconds of sums after the last of `parts`, in the order in which they are computed.

    Args:
        parts: seconds of computing weight gradients, and of summing those over ranks.

    >>> exposed_seconds([(1.0, 2.0), (1.0, 2.0)])
    3.0
    """
    computed = arrived = total = 0.0
    for seconds, summing in parts:
        computed += seconds
        total += summing
        if summing:
            arrived = max(arrived, computed) + summing
    return max(arrived - computed, LEAST_EXPOSED * total)
