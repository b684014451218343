"""Gathers of parameters that start ahead of their use: their buffers, and the time they hide.

It mirrors `runtime/collective_ops.py`: `early_starts` says after how many others each is started.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from ..compiler.ir.buckets import early_starts
from .liveness import Step

__all__ = ["overlapped_seconds", "start_early"]


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


def overlapped_seconds(seconds: Sequence[float], gathered: Sequence[float]) -> float:
    """Time of nodes that run one after the other, where gathers travel beside computation.

    Args:
        seconds: of each node.
        gathered: by node, bytes of what it gathers; 0: it computes.
    """
    waits = [node for node, size in enumerate(gathered) if size]
    starts = early_starts([gathered[node] for node in waits])
    now = wire = 0.0
    done: list[float] = []  # when each gather is there

    def start(waited: int) -> None:
        nonlocal wire
        while len(done) < len(waits) and starts[len(done)] <= waited:
            wire = max(wire, now) + seconds[waits[len(done)]]
            done.append(wire)

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
