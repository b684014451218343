"""The sums of gradients and what follows the last action of a training step on each rank.

The gradients of a stage are reduced during its last backward, bucket by bucket: the weight
gradients of that microbatch are computed in parts, and what a part completes travels while the next
ones compute. Those of parameters that several stages hold are reduced after all actions, as their
stages end at different times. Then come the global gradient norm and clipping (if asked for), the
optimizer step, and the exchange of what each rank has updated. All ranks of a group start the same
collectives in the same order, since they follow from the order of first use in the whole graph.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from ..ir.buckets import (
    BUCKET_BYTES,
    bucket_bytes,
    bucket_ends,
    in_flight_bytes,
    sum_bytes,
    sums_in_flight_bytes,
)
from ..ir.program import (
    GRADIENT_NORM,
    AllGather,
    AllReduce,
    ClipGradients,
    Collective,
    GradientNorm,
    Instruction,
    OptimizerStep,
    ReduceScatter,
    TensorShard,
)
from .buckets import Entry, bound_in_flight, in_backward_order, make_buckets
from .copies import Copy

__all__ = ["Tail"]


@dataclass(frozen=True)
class Tail:
    """Makes the tails of all ranks.

    Args:
        copies: of every trained parameter, in the order of names.
        ranks: that take part in the norm: all that have a stage.
        clip: largest global norm of the gradients; None: not clipped.
    """

    copies: Mapping[str, Mapping[int, Copy]]
    ranks: tuple[int, ...]
    clip: float | None

    def held(self, rank: int) -> list[Entry]:
        """The trained parameters of `rank`."""
        return [(name, copies[rank]) for name, copies in self.copies.items() if rank in copies]

    def terms(self, rank: int) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """`Program.gradient_terms` of `rank`."""
        return tuple((name, c.terms) for name, c in self.held(rank) if len(c.terms) > 1)

    def updates(self, rank: int) -> tuple[TensorShard, ...]:
        """`Program.updates` of `rank`."""
        return tuple(c.update for _, c in self.held(rank) if c.update is not None)

    def offloaded(self, rank: int) -> tuple[str, ...]:
        """`Program.offloaded` of `rank`."""
        return tuple(name for name, c in self.held(rank) if c.is_offloaded)

    def parts(self, rank: int, names: Iterable[str]) -> tuple[tuple[str, ...], ...]:
        """`names`, whose gradients one backward completes on `rank`, as the parts in which it does
        so: as many as fill a bucket. Empty if they need not be apart.

        All ranks that run a stage cut it in the same places, as they may meet inside the parts.
        """
        entries = [
            (name, copy)
            for name, copy in ((name, self.copies[name][rank]) for name in names)
            if copy.is_scattered or (len(copy.summed) > 1 and not copy.is_tied)
        ]
        size = self._most_bytes
        order = in_backward_order(entries)
        parts = bucket_ends(order, lambda item: size[item[0]], sum_bytes(self._total_bytes(rank)))
        return tuple(tuple(name for name, _ in part) for part in parts) if len(parts) > 1 else ()

    def after_part(self, rank: int, names: Iterable[str]) -> Iterator[Instruction]:
        """Once the gradients of `names` are complete on `rank`."""
        entries = [(name, self.copies[name][rank]) for name in names]
        limit = sum_bytes(self._total_bytes(rank))
        yield from _reduce_scatters(entries, limit)
        own = ((n, c) for n, c in entries if not (c.is_tied or c.is_scattered))
        yield from _all_reduces(own, limit)

    def instructions(self, rank: int) -> Iterator[Instruction]:
        """After all actions of a rank that has a stage."""
        held = self.held(rank)
        limit = bucket_bytes(self._total_bytes(rank))
        # those over stages must not depend on what a rank holds besides
        yield from _all_reduces(((n, c) for n, c in held if c.is_tied), BUCKET_BYTES)
        yield from _all_reduces(
            ((n, c) for n, c in held if c.is_scattered and not c.is_tied), limit
        )
        if self.clip is not None:
            yield GradientNorm(tuple(name for name, copy in held if copy.is_owner))
            if len(self.ranks) > 1:
                yield AllReduce((GRADIENT_NORM,), self.ranks)
            yield ClipGradients(self.clip)
        yield OptimizerStep()
        for bucket in make_buckets(
            ((name, copy) for name, copy in held if copy.update is not None),
            key=lambda copy: (copy.peers, copy.held.dtype),
            size=lambda copy: copy.held.num_bytes,
            limit=limit,
        ):
            yield AllGather(*_shares(bucket))

    def bounded(self, rank: int, instructions: Iterable[Instruction]) -> Iterator[Instruction]:
        """`instructions` of `rank` with as many collectives under way as memory is planned for."""
        held = dict(self.held(rank))

        def size(item: Collective) -> int:
            copies = (held[name] for name in item.targets if name != GRADIENT_NORM)
            if isinstance(item, AllReduce):
                return sum(copy.updated.num_bytes for copy in copies)
            return sum(copy.held.num_bytes for copy in copies)

        total = self._total_bytes(rank)
        limits = in_flight_bytes(total), sums_in_flight_bytes(total)
        return bound_in_flight(
            instructions, size, lambda item: limits[not isinstance(item, AllGather)]
        )

    def _total_bytes(self, rank: int) -> int:
        """Bytes of the trained parameters of `rank`, of each the largest part that a rank holds:
        so it is the same on all ranks that run the same stages."""
        return sum(self._most_bytes[name] for name, _ in self.held(rank))

    @functools.cached_property
    def _most_bytes(self) -> dict[str, int]:
        """Of each parameter, bytes of the largest part that a rank holds."""
        return {
            name: max(copy.held.num_bytes for copy in copies.values())
            for name, copies in self.copies.items()
        }


def _reduce_scatters(entries: Iterable[Entry], limit: float) -> Iterator[Instruction]:
    for bucket in make_buckets(
        ((name, copy) for name, copy in entries if copy.is_scattered),
        key=lambda copy: (copy.peers, copy.held.dtype),
        size=lambda copy: copy.held.num_bytes,
        limit=limit,
    ):
        yield ReduceScatter(*_shares(bucket))


def _shares(bucket: tuple[Entry, ...]) -> tuple[tuple[str, ...], tuple[int, ...], tuple[int, ...]]:
    """Targets, dims and ranks of a collective that shares out the tensors of `bucket`."""
    names = tuple(name for name, _ in bucket)
    return names, tuple(copy.dim for _, copy in bucket), bucket[0][1].peers


def _all_reduces(entries: Iterable[Entry], limit: float) -> Iterator[Instruction]:
    for bucket in make_buckets(
        ((name, copy) for name, copy in entries if len(copy.summed) > 1),
        key=lambda copy: (copy.summed, copy.copies, copy.held.dtype),
        size=lambda copy: copy.updated.num_bytes,
        limit=limit,
    ):
        first = bucket[0][1]
        yield AllReduce(tuple(name for name, _ in bucket), first.summed, copies=first.copies)
