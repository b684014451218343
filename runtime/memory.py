"""Measure the memory of a step: allocator statistics on CUDA, allocator events on CPU.

torch's CPU allocator keeps no peak counter, but reports every allocation and release to its
profiler; the running sum of those events is the live memory relative to the start.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

__all__ = [
    "give_back",
    "if_it_fits",
    "measure_peak",
    "peak_resident_bytes",
    "reset_peak_resident",
    "resident_bytes",
    "storage_bytes",
    "until_unused",
    "uses",
]

T = TypeVar("T")
_LONGEST_WAIT_SECONDS = 0.02


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages behind `tensors`."""
    sizes = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors
    }
    return sum(sizes.values())


def give_back(tensor: Tensor) -> None:
    """Free the storage of `tensor`, which nothing reads any more.

    On the CPU that is at once: threads of gloo keep references a while after they are done.
    """
    if tensor.device.type == "cpu" and not tensor.is_pinned():
        tensor.untyped_storage().resize_(0)


def uses(tensor: Tensor) -> int:
    """How many hold `tensor`; 0 where torch does not tell."""
    count: Callable[[], int] = getattr(tensor, "_use_count", lambda: 0)
    return count()


def until_unused(tensor: Tensor, before: int) -> None:
    """Wait until `tensor` has no more `uses` than `before`.

    The thread of gloo that has reduced it keeps it until it goes on to other work: on a machine
    with few cores so long that it would come on top of what is live later. A moment of this thread
    is enough for the other, so there is a limit only lest anything waits for ever.
    """
    end = time.monotonic() + _LONGEST_WAIT_SECONDS
    while uses(tensor) > before and time.monotonic() < end:
        os.sched_yield()


def if_it_fits(run: Callable[[], T], device: torch.device) -> tuple[T | None, str]:
    """Result of `run()`, or None and what the allocator said if it had no memory left.

    What `run` had allocated is free again then.
    """
    try:
        return run(), ""
    except (MemoryError, RuntimeError) as error:
        reason = _no_room(error)
        if not reason:
            raise
    gc.collect()  # frames of the error held tensors
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return None, reason


def _no_room(error: Exception) -> str:
    """What an allocator says that could not give what was asked for; empty: another error."""
    lines = str(error).splitlines() or [""]
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return lines[0] or "out of memory"
    if "DefaultCPUAllocator" in lines[0]:  # torch has no type for it
        return lines[0].partition("DefaultCPUAllocator: ")[2]
    return ""


def measure_peak(
    run: Callable[[], T], device: torch.device, held: Iterable[Tensor]
) -> tuple[T, int]:
    """Result of `run()` and the peak bytes allocated while it ran, `held` tensors included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = run()
        torch.cuda.synchronize(device)
        return result, torch.cuda.max_memory_allocated(device)
    base = storage_bytes(held)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = run()
    live = peak = 0
    for event in _allocator_events(profiler):
        live += event
        peak = max(peak, live)
    return result, base + peak


def _allocator_events(profiler: profile) -> list[int]:
    """Signed sizes of CPU allocations and releases, in time order."""
    inner: Any = profiler.profiler
    events = [
        (event.start_ns(), event.nbytes())
        for event in inner.kineto_results.events()
        if event.name() == "[memory]" and event.device_type().name == "CPU"
    ]
    return [size for _, size in sorted(events, key=lambda item: item[0])]


def resident_bytes() -> int:
    """Resident set size of this process."""
    with open("/proc/self/statm", encoding="ascii") as file:
        pages = int(file.read().split()[1])
    return pages * 4096


def peak_resident_bytes() -> int:
    """Largest resident set size of this process so far, or since `reset_peak_resident` (Linux)."""
    with open("/proc/self/status", encoding="ascii") as file:
        line = next(line for line in file if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def reset_peak_resident() -> None:
    """Measure the peak from now on (Linux; `man 5 proc_pid_clear_refs`)."""
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")
