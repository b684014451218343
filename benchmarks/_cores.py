"""Cores for processes that compute: one each, of which none slows another.

Two processors may be threads of one core, which halves the speed of each while both compute, and a
virtual machine does not always say which. So it is tried out, by products of small matrices.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import torch

__all__ = ["pin_workers", "separate_cores", "unpin_workers"]

_SECONDS = 0.03  # of a trial
_ROWS = 384
_AS_FAST = 0.85  # of its speed alone, a core that shares with nobody keeps at least this


def separate_cores() -> tuple[int, ...]:
    """The processors of this one's that do not slow each other: one of each core."""
    allowed = sorted(os.sched_getaffinity(0))
    chosen = allowed[:1]
    for core in allowed[1:]:
        alone = _speeds([core])[0]
        if _speeds([*chosen, core])[-1] >= _AS_FAST * alone:
            chosen.append(core)
    return tuple(chosen)


def _speeds(cores: Sequence[int]) -> list[float]:
    """Products a second on each of `cores`, all at once: the better of two trials."""
    trials = [_trial(cores) for _ in range(2)]
    return [max(found) for found in zip(*trials, strict=True)]


def _trial(cores: Sequence[int]) -> list[float]:
    found = [0.0] * len(cores)
    ready = threading.Barrier(len(cores))

    def multiply(place: int) -> None:
        os.sched_setaffinity(0, {cores[place]})
        matrix = torch.ones(_ROWS, _ROWS)
        result = torch.mm(matrix, matrix)
        ready.wait()
        begin = time.perf_counter()
        number = 0
        while time.perf_counter() < begin + _SECONDS:
            torch.mm(matrix, matrix, out=result)
            number += 1
        found[place] = number / (time.perf_counter() - begin)

    threads = [threading.Thread(target=multiply, args=(place,)) for place in range(len(cores))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


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
