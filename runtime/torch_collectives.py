"""How collectives over parts of any size become calls of NCCL.

Transfers move bytes between flat buffers. An `Exchange` is one such call: what to start, the buffer
that it fills, and how the result is read out of that. Over gloo see `torch_messages.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .communicator import Split
from .memory import give_back

__all__ = [
    "Exchange",
    "Place",
    "all_gather",
    "all_to_all",
    "is_copy",
    "reduce_scatter",
    "wire_dtype",
]

# torch 2.13 renamed them and warns; 2.11 has the old names only.
_gather_single: Callable[..., Any] = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_scatter_single: Callable[..., Any] = getattr(
    dist, "reduce_scatter_single", dist.reduce_scatter_tensor
)
_WIRE = {torch.int16: torch.int32}  # neither gloo nor NCCL reduces it


def wire_dtype(dtype: torch.dtype) -> torch.dtype:
    """What tensors of `dtype` are reduced in."""
    return _WIRE.get(dtype, dtype)


@dataclass(frozen=True, slots=True)
class Exchange:
    """One collective call.

    Args:
        sent, received: flat buffers on the device that the call works on.
        start: starts it in a group; messages of it have the tag.
        finish: the result, from `received` once that is complete.
        owns_sent: whether `sent` was made for the call, and is not the operand itself.
        is_result: whether the result is `received`, and not a copy.
    """

    sent: Tensor
    received: Tensor
    start: Callable[[Any, int], Any]
    finish: Callable[[Tensor], Tensor]
    owns_sent: bool
    is_result: bool = False

    def result(self, received: Tensor) -> Tensor:
        """The result, once `received` is complete; the buffers are given back."""
        if self.owns_sent:
            give_back(self.sent)
        made = self.finish(received)
        if not self.is_result:
            give_back(received)
        return made


@dataclass(frozen=True, slots=True)
class Place:
    """Where a collective takes place.

    Args:
        ranks: in the order of parts. A group orders its members by rank.
        rank: this one.
        on_host: whether the buffers must be in (pinned) host memory though `device` is not.
    """

    ranks: tuple[int, ...]
    rank: int
    device: torch.device
    on_host: bool

    @property
    def index(self) -> int:
        return self.ranks.index(self.rank)

    @property
    def members(self) -> list[int]:
        """Position of the part of each member of the group, in the group's order."""
        return sorted(range(len(self.ranks)), key=self.ranks.__getitem__)

    def empty(self, count: int, dtype: torch.dtype) -> Tensor:
        if self.on_host:
            return torch.empty(count, dtype=dtype, pin_memory=self.device.type == "cuda")
        return torch.empty(count, dtype=dtype, device=self.device)

    def packed(self, pieces: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
        """`pieces` one after the other in a flat buffer, the i-th in `counts[i]` elements: their
        own memory if they lie there so, else a copy."""
        first = pieces[0]
        if _lie_flat(pieces, counts) and not (self.on_host and first.is_cuda):
            return first.as_strided((sum(counts),), (1,))
        buffer = self.empty(sum(counts), first.dtype)
        for piece, begin in zip(pieces, itertools.accumulate(counts, initial=0), strict=False):
            buffer[begin : begin + piece.numel()].view(piece.shape).copy_(piece)
        return buffer

    def back(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device)


def _lie_flat(pieces: Sequence[Tensor], counts: Sequence[int]) -> bool:
    address = pieces[0].data_ptr()
    for piece, count in zip(pieces, counts, strict=True):
        if piece.data_ptr() != address or piece.numel() != count or not piece.is_contiguous():
            return False
        address += count * piece.element_size()
    return True


def is_copy(sent: Tensor, operand: Tensor) -> bool:
    """Whether `sent` has memory of its own."""
    return sent.untyped_storage().data_ptr() != operand.untyped_storage().data_ptr()


def all_gather(tensor: Tensor, place: Place, split: Split) -> Exchange:
    """Parts are padded to the size of the largest, as groups gather equal sizes only."""
    rest = tensor.numel() // tensor.shape[split.dim]
    count = max(split.sizes) * rest
    sent = place.packed([tensor], [count])
    received = place.empty(count * len(split.sizes), tensor.dtype)
    in_place = place.members == list(range(len(split.sizes)))
    in_place = in_place and split.dim == 0 and split.is_even
    shape = tuple(tensor.shape)  # `finish` must not keep the operand alive

    def finish(buffer: Tensor) -> Tensor:
        rows = buffer.view(len(split.sizes), count)
        if in_place:
            return place.back(rows.view(split.shape(shape, sum(split.sizes))))
        parts: list[Tensor] = [rows[0]] * len(split.sizes)
        for row, position in zip(rows, place.members, strict=True):
            size = split.sizes[position]
            parts[position] = row[: size * rest].view(split.shape(shape, size))
        return place.back(torch.cat(parts, split.dim))

    def start(group: Any, tag: int) -> Any:
        return _gather_single(_bytes(received), _bytes(sent), group=group, async_op=True)

    return Exchange(sent, received, start, finish, is_copy(sent, tensor), in_place)


def reduce_scatter(tensor: Tensor, place: Place, split: Split) -> Exchange:
    """Parts are padded to the size of the largest, as groups scatter equal sizes only."""
    rest = tensor.numel() // tensor.shape[split.dim]
    count = max(split.sizes) * rest
    parts = split.parts(tensor)
    pieces = [parts[position] for position in place.members]
    sent = place.packed(pieces, [count] * len(pieces))
    received = place.empty(count, tensor.dtype)
    shape = split.shape(tensor.shape, split.sizes[place.index])

    def start(group: Any, tag: int) -> Any:
        return _scatter_single(received, sent, dist.ReduceOp.SUM, group=group, async_op=True)

    def finish(buffer: Tensor) -> Tensor:
        return place.back(buffer[: split.sizes[place.index] * rest].view(shape))

    return Exchange(sent, received, start, finish, is_copy(sent, tensor), is_result=True)


def all_to_all(tensor: Tensor, place: Place, gathered: Split, split: Split) -> Exchange:
    parts = split.parts(tensor)
    pieces = [parts[position] for position in place.members]
    own_shape = split.shape(tensor.shape, split.sizes[place.index])
    shapes = [gathered.shape(own_shape, gathered.sizes[position]) for position in place.members]
    counts = [torch.Size(shape).numel() for shape in shapes]

    def finish(buffer: Tensor) -> Tensor:
        rows = buffer.split(counts)
        found = dict(zip(place.members, zip(rows, shapes, strict=True), strict=True))
        ordered = [found[position] for position in range(len(shapes))]
        return place.back(torch.cat([row.view(shape) for row, shape in ordered], gathered.dim))

    sent_counts = [piece.numel() for piece in pieces]
    sent = place.packed(pieces, sent_counts)
    received = place.empty(sum(counts), sent.dtype)
    width = sent.dtype.itemsize

    def start(group: Any, tag: int) -> Any:
        return dist.all_to_all_single(
            _bytes(received),
            _bytes(sent),
            [count * width for count in counts],
            [count * width for count in sent_counts],
            group=group,
            async_op=True,
        )

    return Exchange(sent, received, start, finish, is_copy(sent, tensor))


def _bytes(buffer: Tensor) -> Tensor:
    return buffer.view(torch.uint8)
