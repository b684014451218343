"""Traces as files in Chrome's trace event format, which Perfetto (ui.perfetto.dev) shows.

A rank is a process, its lanes are threads; communications that overlap in time lie on threads of
their own, as events of one thread have to nest. Simulated and measured steps are written alike, so
that both can be opened and compared event by event.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .files import write_whole
from .ir.trace import Lane, TraceEvent

__all__ = ["chrome_trace", "write_chrome_trace"]

_LANES = tuple(Lane)
_MICRO = 1e6


def chrome_trace(
    events: Iterable[TraceEvent],
    memory_curves: Sequence[Sequence[tuple[float, int]]] = (),
    *,
    title: str = "",
) -> dict[str, Any]:
    """The JSON object of a trace.

    Args:
        events: of all ranks.
        memory_curves: per rank, (seconds, bytes) whenever the level changes.
        title: what the trace shows (`simulated`, `measured`), in the names of the processes.
    """
    found = sorted(events, key=lambda one: (one.rank, _LANES.index(one.lane), one.begin_seconds))
    threads = _threads(found)
    ranks = sorted({event.rank for event in found})
    entries = [entry for rank in ranks for entry in _names(rank, title, found, threads)]
    entries += [
        {
            "ph": "X",
            "name": event.name,
            "cat": event.lane.value,
            "pid": event.rank,
            "tid": thread,
            "ts": event.begin_seconds * _MICRO,
            "dur": (event.end_seconds - event.begin_seconds) * _MICRO,
        }
        for event, thread in zip(found, threads, strict=True)
    ]
    entries += [
        {
            "ph": "C",
            "name": "memory",
            "pid": rank,
            "ts": seconds * _MICRO,
            "args": {"bytes": num_bytes},
        }
        for rank, curve in enumerate(memory_curves)
        for seconds, num_bytes in curve
    ]
    return {"traceEvents": entries, "displayTimeUnit": "ms"}


def write_chrome_trace(path: Path, trace: dict[str, Any]) -> None:
    """Write what `chrome_trace` makes.

    Raises:
        UsageError: the file cannot be written.
    """
    write_whole(path, json.dumps(trace), "trace")


def _threads(events: Sequence[TraceEvent]) -> list[int]:
    """The thread of each event: the lane's own, or the first after it that is free by then."""
    ends: dict[tuple[int, int], float] = {}
    chosen = []
    for event in events:
        thread = _LANES.index(event.lane)
        while ends.get((event.rank, thread), 0.0) > event.begin_seconds:
            thread += len(_LANES)
        ends[event.rank, thread] = event.end_seconds
        chosen.append(thread)
    return chosen


def _names(
    rank: int, title: str, events: Sequence[TraceEvent], threads: Sequence[int]
) -> list[dict[str, Any]]:
    """What a rank and its threads are called."""
    process = {
        "ph": "M",
        "name": "process_name",
        "pid": rank,
        "args": {"name": f"rank {rank} {title}".rstrip()},
    }
    lanes = [
        {
            "ph": "M",
            "name": "thread_name",
            "pid": rank,
            "tid": thread,
            "args": {"name": lane.value},
        }
        for thread, lane in sorted(
            {
                (t, event.lane)
                for event, t in zip(events, threads, strict=True)
                if event.rank == rank
            }
        )
    ]
    return [process, *lanes]
