"""Gathers of parameters that start ahead of their use, and sums of gradients that are waited for
after others have started: their buffers, and the time that hides them.

It mirrors `runtime/collective_ops.py`: `early_starts` says after how many others each gather is
started, `late_ends` when each sum is waited for. Where messages make collectives (gloo), those that
are under way together wait for each other's ranks and threads at the same time; on CUDA they are
kernels of one stream.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ..compiler.ir.buckets import early_starts, late_ends
from .liveness import Step

__all__ = ["finish_late", "late_seconds", "overlapped_seconds", "start_early"]


def start_early(
    steps: Sequence[Step], sizes: Sequence[float], new_storage: Callable[[], int]
) -> tuple[Step, ...]:
    """`steps` with the memory of what arrives from when a gather starts.

    Args:
        sizes: by step, bytes of what it gathers; 0: it gathers no parameter.
    """
    waits = [position for position, size in enumerate(sizes) if size]
    starts = early_starts([sizes[position] for position in waits])
    ahead: dict[int, list[Step]] = {}  # by position, what starts before that step
    changed: dict[int, Step] = {}
    for position, waited in zip(waits, starts, strict=True):
        step, storage = steps[position], new_storage()
        place = waits[waited - 1] + 1 if waited else 0
        ahead.setdefault(place, []).append(Step(step.node, (), ((storage, sizes[position]),)))
        # what arrives is among the step's temporaries or results, else
        changed[position] = replace(
            step,
            reads=(*step.reads, storage),
            temporary_bytes=step.temporary_bytes - sizes[position],
        )
    made: list[Step] = []
    for position, step in enumerate(steps):
        made += [*ahead.get(position, ()), changed.get(position, step)]
    return tuple(made)


def finish_late(
    steps: Sequence[Step], sizes: Sequence[float], new_storage: Callable[[], int]
) -> tuple[Step, ...]:
    """`steps` with the memory of sums until they are waited for.

    What is sent is among the temporaries of a step that sums: the gradient itself, where it lies as
    it is sent, else a copy, after which the gradient may go. A part of something larger that lies
    so keeps all of that.

    Args:
        sizes: by step, bytes of the gradient that it sums; 0: it sums none.
    """
    made_bytes = {storage: size for step in steps for storage, size in step.writes}
    places = [position for position, size in enumerate(sizes) if size]
    ends = late_ends([sizes[position] for position in places])
    changed: dict[int, Step] = {}
    later: dict[int, list[Step]] = {}  # by position, what ends before that step
    for position, end in zip(places, ends, strict=True):
        step, storage = steps[position], new_storage()
        writes = (*step.writes, (storage, step.temporary_bytes))
        changed[position] = replace(step, writes=writes, temporary_bytes=0.0)
        larger = [
            item for item in step.reads if made_bytes.get(item, math.inf) > step.temporary_bytes
        ]
        reads = (*larger, *(made for made, _ in writes))
        place = places[end] if end < len(places) else len(steps)
        later.setdefault(place, []).append(Step(step.node, reads, ()))
    made: list[Step] = []
    for position, step in enumerate(steps):
        made += [*later.get(position, ()), changed.get(position, step)]
    return (*made, *later.get(len(steps), ()))


def late_seconds(parts: Sequence[tuple[float, float, float]], waiting: float = 0.0) -> float:
    """Time of computing gradients, where sums travel beside what is computed next.

    Args:
        parts: seconds of computing, then of summing what is complete, and bytes of that.
        waiting: seconds of a sum in which nothing travels, so that others do.

    >>> late_seconds([(2.0, 1.0, 8.0), (2.0, 1.0, 8.0)])
    5.0
    """
    sums = [(seconds, size) for _, seconds, size in parts if size]
    ends = late_ends([size for _, size in sums])
    wire = _Wire(waiting)
    now = 0.0
    done: list[float] = []  # when each sum is there
    waited = 0
    for computing, summing, size in parts:
        now += computing
        if not size:
            continue
        while waited < len(done) and ends[waited] <= len(done):
            now = max(now, done[waited])
            waited += 1
        done.append(wire.carry(now, summing))
    return max([now, *done])


def overlapped_seconds(
    seconds: Sequence[float], gathered: Sequence[float], waiting: float = 0.0
) -> float:
    """Time of nodes that run one after the other, where gathers travel beside computation.

    Args:
        seconds: of each node.
        gathered: by node, bytes of what it gathers; 0: it computes.
        waiting: seconds of a gather in which nothing travels, so that others do.
    """
    waits = [node for node, size in enumerate(gathered) if size]
    starts = early_starts([gathered[node] for node in waits])
    wire = _Wire(waiting)
    now = 0.0
    done: list[float] = []  # when each gather is there

    def start(waited: int) -> None:
        while len(done) < len(waits) and starts[len(done)] <= waited:
            done.append(wire.carry(now, seconds[waits[len(done)]]))

    start(0)
    waited = 0
    for node, length in enumerate(seconds):
        if gathered[node]:
            now = max(now, done[waited])
            waited += 1
            start(waited)
        else:
            now += length
    return now


@dataclass(slots=True)
class _Wire:
    """What travels one after the other, but for the `waiting` that each begins with."""

    waiting: float
    free: float = 0.0

    def carry(self, now: float, seconds: float) -> float:
        """When what starts at `now` and takes `seconds` alone is there."""
        waiting = min(self.waiting, seconds)
        self.free = max(self.free, now + waiting) + seconds - waiting
        return self.free
