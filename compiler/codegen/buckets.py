"""Group the tensors of collectives into buckets: one message instead of many.

Small messages cost latency, and one message with all gradients could only start when backward is
over. Tensors share a bucket that travel between the same ranks in the same dtype and are ready at
the same time, in the order in which backward completes gradients: the reverse of first use.

A bucket takes memory while it travels, so few are under way at once: `bound_in_flight` lets a rank
await the oldest before it starts another.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator

from ..ir.buckets import fill
from ..ir.program import (
    Await,
    ClipGradients,
    Collective,
    GradientNorm,
    Instruction,
    OptimizerStep,
)
from .copies import Copy

__all__ = ["bound_in_flight", "in_backward_order", "make_buckets"]

Entry = tuple[str, Copy]


def in_backward_order(entries: Iterable[Entry]) -> list[Entry]:
    """`entries` in the order in which backward completes their gradients."""
    return sorted(entries, key=lambda entry: (-entry[1].first_use, entry[0]))


def make_buckets(
    entries: Iterable[Entry],
    key: Callable[[Copy], Hashable],
    size: Callable[[Copy], int],
    limit: float,
) -> Iterator[tuple[Entry, ...]]:
    """Buckets of `entries` with equal keys, none of several tensors above `limit` bytes."""
    alike: dict[Hashable, list[Entry]] = {}
    order = in_backward_order(entries)
    for entry in order:
        alike.setdefault(key(entry[1]), []).append(entry)
    place = {name: position for position, (name, _) in enumerate(order)}
    buckets = [b for group in alike.values() for b in fill(group, lambda e: size(e[1]), limit)]
    buckets.sort(key=lambda bucket: place[bucket[0][0]])
    return (tuple(bucket) for bucket in buckets)


def bound_in_flight(
    instructions: Iterable[Instruction],
    size: Callable[[Collective], int],
    limit: Callable[[Collective], float],
) -> Iterator[Instruction]:
    """`instructions` with an `Await` wherever collectives under way would exceed the `limit` in
    bytes of the next one.

    What is awaited was started before, and all ranks of a group start its collectives in one order,
    so no two ranks can come to wait for each other.
    """
    pending: list[Collective] = []
    for item in instructions:
        if isinstance(item, Collective):
            pending = _apart_from(pending, item.targets)
            while pending and sum(map(size, pending)) + size(item) > limit(item):
                yield Await(pending[0].targets)
                pending = _apart_from(pending, pending[0].targets)
            pending.append(item)
        elif isinstance(item, GradientNorm | ClipGradients | OptimizerStep):
            pending = []
        yield item


def _apart_from(pending: list[Collective], targets: tuple[str, ...]) -> list[Collective]:
    """Those of `pending` that nobody awaits who awaits `targets`."""
    return [item for item in pending if set(targets).isdisjoint(item.targets)]
