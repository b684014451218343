"""Peak of live storages over a sequence of steps: the arithmetic under memory prediction.

A step reads storages, writes new ones and uses temporary bytes. A storage lives from the step that
writes it (or from the start) to its last reader, or to the end if it is kept.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Liveness", "Step", "live_bytes"]


@dataclass(frozen=True, slots=True)
class Step:
    """One kernel: `writes` are (storage, bytes); `node` is the graph node it comes from."""

    node: int
    reads: tuple[int, ...]
    writes: tuple[tuple[int, float], ...]
    temporary_bytes: float = 0.0


@dataclass(frozen=True, slots=True)
class Liveness:
    """Live bytes while each step runs, their peak, and storages alive at the end."""

    at_step: tuple[float, ...]
    peak_bytes: float
    end: dict[int, float]


def live_bytes(
    steps: Sequence[Step], initial: Mapping[int, float], keep: Collection[int]
) -> Liveness:
    """Liveness of `steps`.

    Args:
        initial: storages that are alive at the start, with their bytes.
        keep: storages that stay alive to the end.
    """
    last = dict.fromkeys(initial, -1)
    for position, step in enumerate(steps):
        for storage, _ in step.writes:
            last[storage] = position
        for storage in step.reads:
            if storage in last:
                last[storage] = position
    live = dict(initial)
    total = peak = sum(live.values())
    dying: list[list[int]] = [[] for _ in steps]
    for storage, position in last.items():
        if storage in keep:
            continue
        if position < 0:
            total -= live.pop(storage)
        else:
            dying[position].append(storage)
    table = []
    for position, step in enumerate(steps):
        for storage, size in step.writes:
            live[storage] = size
            total += size
        table.append(total + step.temporary_bytes)
        for storage in dying[position]:
            total -= live.pop(storage)
    return Liveness(tuple(table), max([peak, *table]), live)
