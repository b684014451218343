"""How large the buckets of a step's sums and gathers are, and how many are under way at once.

Gradients and updated parameters travel in buckets, several tensors in one message. A bucket takes
memory beside the tensors while it travels, and nothing hides the last one behind computation, so a
rank's parameters are cut into about eight, of at most 25 MiB. (Li et al., PyTorch Distributed,
2020, measured that larger ones gain nothing: at 25 MiB, latency is well below a tenth of the time
on the wire.) Two may be under way: one travels while the next is laid down.

Buckets of gradients start inside the last backward, which is cut where they are complete. Each cut
is one more kernel to make, so that there are about 32 at most, whatever their size.

The code generator makes buckets by these figures, and the memory model counts their bytes. Inside
stages, parameters that are held in parts (ZeRO 3) are gathered ahead of their use under the same
limit, and gradients that are kept in parts (ZeRO 2 and 3) are summed beside what computes next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

__all__ = [
    "BUCKET_BYTES",
    "bucket_bytes",
    "bucket_ends",
    "early_starts",
    "fill",
    "in_flight_bytes",
    "late_ends",
    "sum_bytes",
    "sums_in_flight_bytes",
]

BUCKET_BYTES = 25 << 20
_LEAST_BYTES = 64 << 10
_PARTS = 8
_MOST_CUTS = 32

Item = TypeVar("Item")


def bucket_bytes(total_bytes: float) -> float:
    """Most bytes of a bucket of several tensors, where a rank trains parameters of
    `total_bytes`."""
    return min(BUCKET_BYTES, max(_LEAST_BYTES, total_bytes / _PARTS))


def sum_bytes(total_bytes: float) -> float:
    """As `bucket_bytes`, for buckets of gradients that one stage's last backward completes."""
    return max(bucket_bytes(total_bytes), total_bytes / _MOST_CUTS)


def in_flight_bytes(total_bytes: float) -> float:
    """Most bytes of the buckets under way at once; a single one may be larger."""
    return 2 * bucket_bytes(total_bytes)


def sums_in_flight_bytes(total_bytes: float) -> float:
    """Likewise, of buckets of gradients."""
    return 2 * sum_bytes(total_bytes)


def fill(items: Iterable[Item], size: Callable[[Item], float], limit: float) -> list[list[Item]]:
    """`items` in buckets of neighbours, none of several items above `limit`."""
    buckets: list[list[Item]] = []
    total = 0.0
    for item in items:
        total += size(item)
        if not buckets or total > limit:
            buckets.append([])
            total = size(item)
        buckets[-1].append(item)
    return buckets


def bucket_ends(
    items: Iterable[Item], size: Callable[[Item], float], limit: float
) -> list[list[Item]]:
    """`items` in groups of one or several buckets (`fill`), all but the last at least half full:
    where it pays to stop computing gradients and send off what is complete."""
    groups: list[list[Item]] = []
    is_full = True
    for bucket in fill(items, size, limit):
        if is_full:
            groups.append([])
        groups[-1] += bucket
        is_full = sum(map(size, groups[-1])) >= limit / 2
    return groups


def early_starts(sizes: Sequence[float]) -> tuple[int, ...]:
    """When to start each of the gathers of a kernel, which are waited for one after the other.

    At the beginning, and whenever one was waited for, the next are started, as many as may be under
    way, at least one.

    Args:
        sizes: bytes of what each gather makes.

    Returns:
        for each, how many are waited for before it starts.
    """
    limit = in_flight_bytes(sum(sizes))
    starts: list[int] = []
    for waited in range(len(sizes)):
        under_way = sum(sizes[waited : len(starts)])
        while len(starts) < len(sizes) and (
            len(starts) == waited or under_way + sizes[len(starts)] <= limit
        ):
            under_way += sizes[len(starts)]
            starts.append(waited)
    return tuple(starts)


def late_ends(sizes: Sequence[float]) -> tuple[int, ...]:
    """When to wait for each of the sums of gradients of a kernel, which start one after the other.

    Before one starts, the oldest are waited for, so that no more are under way than may be; those
    that are left are waited for at the end.

    Args:
        sizes: bytes of what each sums.

    Returns:
        for each, how many have started before it is waited for.
    """
    limit = in_flight_bytes(sum(sizes))
    ends: list[int] = []
    for started, size in enumerate(sizes):
        under_way = sum(sizes[len(ends) : started])
        while len(ends) < started and under_way + size > limit:
            under_way -= sizes[len(ends)]
            ends.append(started)
    return (*ends, *[len(sizes)] * (len(sizes) - len(ends)))
