"""Cores for processes that compute: one each, as two threads of a core slow each other."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

__all__ = ["pin_workers", "separate_cores", "stolen", "unpin_workers"]

_SIBLINGS = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"


def separate_cores() -> tuple[int, ...]:
    """Of the processors that this process may use, one of each core, as far as the system says."""
    found: dict[str, int] = {}
    for number in sorted(os.sched_getaffinity(0)):
        siblings = Path(_SIBLINGS.format(number))
        found.setdefault(siblings.read_text() if siblings.exists() else str(number), number)
    return tuple(found.values())


def stolen() -> tuple[float, float]:
    """Processor time of this machine since it started, in ticks: that its host gave to others while
    it was wanted here, and all that was wanted (Linux)."""
    fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    user, nice, system, _, _, interrupt, soft, steal = map(float, fields)
    return steal, user + nice + system + interrupt + soft + steal


def unpin_workers(process_ids: Sequence[int]) -> None:
    """All threads of each process to any processor."""
    allowed = os.sched_getaffinity(0)
    for process in process_ids:
        for task in _threads(process):
            os.sched_setaffinity(task, allowed)


def pin_workers(process_ids: Sequence[int], cores: Sequence[int]) -> None:
    """The main thread of each process to its core, its other threads to no worker's core.

    Linux only; call it again after threads were added, which start where their parent is.
    """
    others = set(os.sched_getaffinity(0)) - set(cores)
    for process, core in zip(process_ids, cores, strict=False):
        for task in _threads(process):
            os.sched_setaffinity(task, {core} if task == process else others)


def _threads(process: int) -> list[int]:
    return [int(task.name) for task in Path(f"/proc/{process}/task").iterdir()]
