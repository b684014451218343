"""How long a device was busy, whatever else its machine does meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

__all__ = ["busy_clock"]


def busy_clock(device: torch.device) -> Callable[[], float]:
    """A function whose differences are seconds of work.

    On the CPU those of the calling thread, which takes part in all that its worker computes: time
    in which it waits or other processes have its core does not count. On CUDA wall time, read when
    the current stream is done.
    """
    if device.type != "cuda":
        return time.thread_time

    def now() -> float:
        # not the device: a receive under way may need what this rank is yet to compute
        torch.cuda.current_stream(device).synchronize()
        return time.perf_counter()

    return now
