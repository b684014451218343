"""Rectangles inside a rank's part of a value: whether they lie in it, and cover it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from ..program import TensorShard
from ..types import TensorType

__all__ = ["Cover", "is_inside", "overlap"]

Box = tuple[tuple[int, ...], tuple[int, ...]]  # offset and shape


def is_inside(part: TensorShard, offset: tuple[int, ...], type: TensorType) -> bool:
    """Whether a rectangle of the whole value lies in `part`."""
    return (
        type.dtype == part.part.dtype
        and len(type.shape) == len(offset) == len(part.offset)
        and all(
            begin <= first and size >= 0 and first + size <= begin + length
            for first, size, begin, length in zip(
                offset, type.shape, part.offset, part.part.shape, strict=True
            )
        )
    )


def overlap(one: Box, two: Box) -> bool:
    """Whether two rectangles have elements in common."""
    dims = zip(*one, *two, strict=True)
    return all(a < b + size and b < a + length for a, length, b, size in dims)


@dataclass(slots=True)
class Cover:
    """Rectangles that together become a rank's `part` of a value."""

    part: TensorShard
    boxes: list[Box] = field(default_factory=list)

    def add(self, offset: tuple[int, ...], type: TensorType) -> bool:
        """Enter a rectangle; whether it is inside, and new."""
        box = offset, type.shape
        fits = is_inside(self.part, offset, type)
        if fits and not any(overlap(box, other) for other in self.boxes):
            self.boxes.append(box)
            return True
        return False

    @property
    def is_complete(self) -> bool:
        """Whether nothing of the part is missing."""
        return sum(math.prod(shape) for _, shape in self.boxes) == math.prod(self.part.part.shape)
