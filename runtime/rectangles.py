"""Registers that arrive in rectangles, from several ranks, and leave in such.

Where stages have meshes of their own, a rank's part of a boundary value is put together from what
several ranks send, and several ranks take parts of it (see `Send` and `Recv`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..compiler.ir.program import TensorShard
from ..compiler.ir.types import TensorType
from .communicator import Pending

__all__ = ["Arriving", "rectangle_of"]


def rectangle_of(
    tensor: Tensor, part: TensorShard, offset: Sequence[int], shape: Sequence[int]
) -> Tensor:
    """View of a rectangle of a value, at `offset` of the whole, in `tensor`, a rank's `part`."""
    for dim, (first, begin, size) in enumerate(zip(offset, part.offset, shape, strict=True)):
        tensor = tensor.narrow(dim, first - begin, size)
    return tensor


class Arriving:
    """A rank's `part` of a value while its rectangles are under way."""

    def __init__(self, part: TensorShard, device: torch.device) -> None:
        self._part = part
        self._device = device
        self._pieces: list[tuple[Pending, tuple[int, ...], TensorType]] = []

    def add(self, pending: Pending, offset: tuple[int, ...], type: TensorType) -> None:
        """Expect a rectangle."""
        self._pieces.append((pending, offset, type))

    @property
    def pieces(self) -> tuple[Pending, ...]:
        """What is waited for."""
        return tuple(pending for pending, _, _ in self._pieces)

    def wait(self, timeout_seconds: float) -> Tensor:
        """The part, once all of it is there; raises as `Pending.wait` does."""
        type = self._part.part
        if len(self._pieces) == 1 and self._pieces[0][2] == type:
            return _arrived(self._pieces[0][0], timeout_seconds)
        whole = torch.empty(type.shape, dtype=type.dtype, device=self._device)
        for pending, offset, piece in self._pieces:
            view = rectangle_of(whole, self._part, offset, piece.shape)
            view.copy_(_arrived(pending, timeout_seconds))
        self._pieces.clear()
        return whole


def _arrived(pending: Pending, timeout_seconds: float) -> Tensor:
    tensor = pending.wait(timeout_seconds)
    assert tensor is not None
    return tensor
