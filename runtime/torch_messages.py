"""Collectives over gloo as messages of each rank to each other.

As many bytes travel as in a ring, but parts may differ in size, arrive in their places, and take no
memory besides: gloo's own all-gather fills a buffer of its own first, it has no reduce-scatter, and
its threads hold on to the tensors of a collective a while after it is done.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .communicator import Split
from .torch_collectives import Exchange, Place, is_copy

__all__ = ["all_gather", "all_to_all", "reduce_scatter"]


class _Messages:
    """Sends and receives under way that together are one piece of work."""

    def __init__(self, works: Sequence[Any]) -> None:
        self._works = works

    def is_completed(self) -> bool:
        return all(work.is_completed() for work in self._works)

    def wait(self, timeout: timedelta) -> bool:
        end = time.monotonic() + timeout.total_seconds()
        for work in self._works:
            work.wait(timedelta(seconds=max(end - time.monotonic(), 1e-3)))
        return True


def all_gather(tensor: Tensor, place: Place, split: Split) -> Exchange:
    """Every rank sends its part to every other."""
    shapes = [split.shape(tensor.shape, size) for size in split.sizes]
    counts = [torch.Size(shape).numel() for shape in shapes]
    sent = place.packed([tensor], [tensor.numel()])
    received = place.empty(sum(counts), tensor.dtype)
    rows = received.split(counts)
    start = _starter(place, [sent] * len(rows), rows)
    rows[place.index].copy_(sent)
    whole = split.shape(tensor.shape, sum(split.sizes))

    def finish(buffer: Tensor) -> Tensor:
        if split.dim == 0:
            return place.back(buffer.view(whole))
        parts = [row.view(shape) for row, shape in zip(buffer.split(counts), shapes, strict=True)]
        return place.back(torch.cat(parts, split.dim))

    return Exchange(sent, received, start, finish, is_copy(sent, tensor), split.dim == 0)


def reduce_scatter(tensor: Tensor, place: Place, split: Split) -> Exchange:
    """Every rank adds what all have of its part, in the order of ranks."""
    pieces = split.parts(tensor)
    shape, count = pieces[place.index].shape, pieces[place.index].numel()
    members = place.members

    def finish(buffer: Tensor) -> Tensor:
        rows = buffer.view(len(members), *shape)
        total = rows[members[0]].clone()
        for position in members[1:]:
            total += rows[position]
        return place.back(total)

    return _swap(place, tensor, pieces, [count] * len(pieces), finish)


def all_to_all(tensor: Tensor, place: Place, gathered: Split, split: Split) -> Exchange:
    """Every rank sends every other the part that it is to have."""
    own = split.shape(tensor.shape, split.sizes[place.index])
    shapes = [gathered.shape(own, size) for size in gathered.sizes]
    counts = [torch.Size(shape).numel() for shape in shapes]

    def finish(buffer: Tensor) -> Tensor:
        rows = zip(buffer.split(counts), shapes, strict=True)
        return place.back(torch.cat([row.view(shape) for row, shape in rows], gathered.dim))

    return _swap(place, tensor, split.parts(tensor), counts, finish)


def _swap(
    place: Place,
    tensor: Tensor,
    pieces: Sequence[Tensor],
    counts: Sequence[int],
    finish: Callable[[Tensor], Tensor],
) -> Exchange:
    """The i-th of `pieces` goes to the i-th rank; `counts[i]` elements come from there."""
    sizes = [piece.numel() for piece in pieces]
    sent = place.packed(pieces, sizes)
    received = place.empty(sum(counts), tensor.dtype)
    rows, columns = received.split(list(counts)), sent.split(sizes)
    rows[place.index].copy_(columns[place.index])
    start = _starter(place, columns, rows)
    return Exchange(sent, received, start, finish, is_copy(sent, tensor))


def _starter(
    place: Place, sent: Sequence[Tensor], received: Sequence[Tensor]
) -> Callable[[Any, int], Any]:
    """Starts the messages to and from all ranks, whose i-th is the i-th of `place.ranks`.

    Each begins with the rank after it, so that not all send to the same one at first.
    """
    others = [(place.index + step) % len(place.ranks) for step in range(1, len(place.ranks))]

    def start(group: Any, tag: int) -> Any:
        works: list[Any] = []
        for other in others:
            source, row = place.ranks[other], received[other].view(torch.uint8)
            works.append(dist.irecv(row, source, group=group, tag=tag))
        for other in others:
            piece = sent[other].view(torch.uint8)
            works.append(dist.isend(piece, place.ranks[other], group=group, tag=tag))
        return _Messages(works)

    return start
