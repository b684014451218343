"""Parts of tensors in place, and buckets: several tensors that travel as one message.

A bucket is one flat buffer: tensors are copied in, one collective runs, results are copied out.
What ranks share out is laid down rank by rank, each rank's parts of all tensors together, so that
the buffer is split in one place a rank. Buffers are what buckets cost in memory, so there are no
others on the way, and they are given back as soon as results are copied out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..compiler.ir.mesh import chunk_sizes
from ..compiler.ir.program import Program
from .communicator import Communicator, Pending, Split
from .memory import give_back

__all__ = [
    "Part",
    "start_all_gather",
    "start_all_reduce",
    "start_reduce_scatter",
    "updated_parts",
    "view_of",
]

Part = tuple[tuple[int, ...], tuple[int, ...]]  # offset and shape


def view_of(whole: Tensor, offset: Sequence[int], shape: Sequence[int]) -> Tensor:
    """The rectangular part of `whole`, as a view."""
    part = whole
    for dim, (begin, size) in enumerate(zip(offset, shape, strict=True)):
        part = part.narrow(dim, begin, size)
    return part


def updated_parts(program: Program) -> dict[str, Part]:
    """For parameters of which the rank updates less than it holds, which part of that."""
    held = {shard.name: shard for shard in program.shards}
    inner = (shard.within(held.get(shard.name)) for shard in program.updates)
    return {shard.name: (shard.offset, shard.part.shape) for shard in inner}


class _Bucket:
    """A collective under way, whose results are copied out when it is first waited for."""

    def __init__(self, pending: Pending, flat: Tensor, unpack: Callable[[Tensor], None]) -> None:
        self._pending: Pending | None = pending
        self._flat: Tensor | None = flat
        self._unpack = unpack

    def done(self) -> bool:
        return self._pending is None or self._pending.done()

    def wait(self, timeout_seconds: float | None = None) -> None:
        if self._pending is None:
            return
        result = self._pending.wait(timeout_seconds)
        assert result is not None and self._flat is not None
        with torch.no_grad():
            self._unpack(result)
        give_back(self._flat)
        give_back(result)
        self._pending = self._flat = None


def start_all_reduce(
    communicator: Communicator,
    tensors: Sequence[Tensor],
    ranks: Sequence[int],
    reduction: str,
    *,
    label: str,
) -> Pending:
    """Start reducing `tensors` in place over `ranks`."""
    if len(tensors) == 1:
        return communicator.start_all_reduce(tensors[0], ranks, reduction, label=label)
    flat = _flat(tensors)
    pending = communicator.start_all_reduce(flat, ranks, reduction, label=label)
    return _Bucket(pending, flat, lambda result: _copy_out(result, tensors))


def start_reduce_scatter(
    communicator: Communicator,
    tensors: Sequence[Tensor],
    dims: Sequence[int],
    ranks: Sequence[int],
    *,
    label: str,
) -> Pending:
    """Start summing `tensors` over `ranks`; this rank's parts are overwritten by their sums."""
    shares = _shares(tensors, dims, len(ranks))
    flat = _flat([part for parts in shares for part in parts])
    pending = communicator.start_reduce_scatter(flat, ranks, _split(shares), label=label)
    own = shares[list(ranks).index(communicator.rank)]
    return _Bucket(pending, flat, lambda result: _copy_out(result, own))


def start_all_gather(
    communicator: Communicator,
    tensors: Sequence[Tensor],
    dims: Sequence[int],
    ranks: Sequence[int],
    *,
    label: str,
) -> Pending:
    """Start filling `tensors`, of which each of `ranks` has its part, with the others' parts."""
    shares = _shares(tensors, dims, len(ranks))
    own = list(ranks).index(communicator.rank)
    largest = max(_split(shares).sizes)
    split = Split(0, (largest,) * len(ranks))  # of equal parts, which arrive in their places
    flat = _flat(shares[own], largest)
    pending = communicator.start_all_gather(flat, ranks, split, label=label)

    def unpack(result: Tensor) -> None:
        for index, (segment, parts) in enumerate(zip(split.parts(result), shares, strict=True)):
            if index != own:
                _copy_out(segment, parts)

    return _Bucket(pending, flat, unpack)


def _shares(tensors: Sequence[Tensor], dims: Sequence[int], count: int) -> list[list[Tensor]]:
    """For each of `count` ranks, views of its parts of all tensors."""
    cut = [
        tensor.split(chunk_sizes(tensor.shape[dim], count), dim)
        for tensor, dim in zip(tensors, dims, strict=True)
    ]
    return [[parts[index] for parts in cut] for index in range(count)]


def _split(shares: Sequence[Sequence[Tensor]]) -> Split:
    return Split(0, tuple(sum(part.numel() for part in parts) for parts in shares))


def _flat(tensors: Sequence[Tensor], count: int | None = None) -> Tensor:
    """`tensors` one after the other, without further copies on the way; `count`: elements of the
    buffer, if it has more."""
    total = sum(tensor.numel() for tensor in tensors)
    flat = tensors[0].new_empty(count or total)
    with torch.no_grad():
        for place, tensor in zip(_places(flat, tensors), tensors, strict=True):
            place.copy_(tensor)
    return flat


def _copy_out(flat: Tensor, tensors: Sequence[Tensor]) -> None:
    for place, tensor in zip(_places(flat, tensors), tensors, strict=True):
        tensor.copy_(place)


def _places(flat: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Where each of `tensors` lies in `flat`, in its shape."""
    sizes = [tensor.numel() for tensor in tensors]
    parts = flat[: sum(sizes)].split(sizes)
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
