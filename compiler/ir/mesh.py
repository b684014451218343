"""Device meshes and tensor layouts, in DTensor's vocabulary.

A mesh names *axes*; a tensor has *dims*. A layout gives one placement per mesh axis. Sharded dims
need not divide evenly: part i of n of a dim of size d has `ceil(d/n)` elements for the first parts
and what is left for the last ones (the rule of `torch.chunk`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from .types import TensorType

__all__ = [
    "Layout",
    "Mesh",
    "MeshAxis",
    "Partial",
    "Placement",
    "Replicate",
    "Shard",
    "chunk_sizes",
    "format_stage_meshes",
    "local_offset",
    "local_type",
    "parse_stage_meshes",
]

_MOST_DIGITS = 18  # of a number that anybody means


@dataclass(frozen=True, slots=True)
class MeshAxis:
    """A named axis: `data`, `pipeline`, `tensor`, `expert`, `context`."""

    name: str
    size: int


@dataclass(frozen=True, slots=True)
class Mesh:
    """Axes from slowest to fastest varying rank. Prints as `data=2,pipeline=4`."""

    axes: tuple[MeshAxis, ...]

    @property
    def size(self) -> int:
        return math.prod(axis.size for axis in self.axes)

    def axis(self, name: str) -> MeshAxis:
        """The axis called `name`, of size 1 if the mesh has none."""
        return next((axis for axis in self.axes if axis.name == name), MeshAxis(name, 1))

    @staticmethod
    def parse(text: str) -> Mesh:
        """Inverse of `str`. Raises ValueError on malformed text."""
        axes = []
        for item in filter(None, text.split(",")):
            name, equals, size = item.partition("=")
            if not equals or not _is_number(size) or int(size) < 1:
                raise ValueError(f"not a mesh axis: {item!r} (expected name=size)")
            axes.append(MeshAxis(name, int(size)))
        return Mesh(tuple(axes))

    def __str__(self) -> str:
        return ",".join(f"{axis.name}={axis.size}" for axis in self.axes)


def format_stage_meshes(meshes: Iterable[Mesh]) -> str:
    """In-stage meshes, stage after stage: `data=2/tensor=2/data=1`, the last on one device."""
    return "/".join(str(mesh) or "data=1" for mesh in meshes)


def parse_stage_meshes(text: str) -> tuple[Mesh, ...]:
    """Inverse of `format_stage_meshes`; axes of one device are left out.

    Raises:
        ValueError: an item is no mesh, or names no axis.
    """
    meshes = []
    for item in text.split("/"):
        mesh = Mesh.parse(item)
        if not mesh.axes:
            raise ValueError(f"not a mesh of a stage: {item!r} (one device is data=1)")
        meshes.append(Mesh(tuple(axis for axis in mesh.axes if axis.size > 1)))
    return tuple(meshes)


@dataclass(frozen=True, slots=True)
class Shard:
    """Split along tensor dim `dim` over the mesh axis."""

    dim: int

    def __str__(self) -> str:
        return f"S({self.dim})"


@dataclass(frozen=True, slots=True)
class Replicate:
    """The whole tensor on every device of the mesh axis."""

    def __str__(self) -> str:
        return "R"


@dataclass(frozen=True, slots=True)
class Partial:
    """Each device holds a term; the tensor is their `reduction` (`sum`, `avg`, `max`, `min`)."""

    reduction: str = "sum"

    def __str__(self) -> str:
        return f"P({self.reduction})"


Placement = Shard | Replicate | Partial


@dataclass(frozen=True, slots=True)
class Layout:
    """One placement per mesh axis, in the mesh's order. Prints as `[S(0),R]`."""

    placements: tuple[Placement, ...]

    @staticmethod
    def parse(text: str) -> Layout:
        """Inverse of `str`. Raises ValueError on malformed text."""
        if not (text.startswith("[") and text.endswith("]")):
            raise ValueError(f"not a layout: {text!r}")
        return Layout(tuple(_parse_placement(item) for item in filter(None, text[1:-1].split(","))))

    def __str__(self) -> str:
        return f"[{','.join(map(str, self.placements))}]"


def _is_number(text: str) -> bool:
    """Whether `int` takes it: not all that are digits to Python, and not any number of them."""
    return text.isdecimal() and len(text) <= _MOST_DIGITS


def _parse_placement(text: str) -> Placement:
    if text == "R":
        return Replicate()
    kind, body = text[:2], text[2:-1]
    if text.endswith(")") and kind == "S(" and _is_number(body):
        return Shard(int(body))
    if text.endswith(")") and kind == "P(" and body in ("sum", "avg", "max", "min"):
        return Partial(body)
    raise ValueError(f"not a placement: {text!r} (expected R, S(dim) or P(reduction))")


def chunk_sizes(size: int, parts: int) -> tuple[int, ...]:
    """Sizes of the parts of a dim: `ceil(size / parts)` for the first ones, the rest for the last
    (the rule of `torch.chunk`)."""
    part = -(-size // parts)
    return tuple(max(0, min(part, size - part * index)) for index in range(parts))


def local_type(
    type: TensorType, layout: Layout, mesh: Mesh, coordinate: tuple[int, ...]
) -> TensorType:
    """Type of the part of a tensor held at `coordinate` of `mesh`.

    Raises:
        ValueError: layout and mesh differ in length, or a sharded dim does not exist.
    """
    if len(layout.placements) != len(mesh.axes):
        raise ValueError(f"layout {layout} has not one placement per axis of mesh {mesh}")
    shape = list(type.shape)
    for placement, axis, position in zip(layout.placements, mesh.axes, coordinate, strict=True):
        if isinstance(placement, Shard):
            if placement.dim >= len(shape):
                raise ValueError(f"{type} has no dim {placement.dim} to shard")
            part = -(-shape[placement.dim] // axis.size)
            shape[placement.dim] = max(0, min(part, shape[placement.dim] - part * position))
    return TensorType(tuple(shape), type.dtype)


def local_offset(
    type: TensorType, layout: Layout, mesh: Mesh, coordinate: tuple[int, ...]
) -> tuple[int, ...]:
    """Where the part of a tensor held at `coordinate` begins in the whole tensor, per dim.

    Raises:
        ValueError: as `local_type`.
    """
    offset = [0] * len(type.shape)
    for position, placement in enumerate(layout.placements):
        if isinstance(placement, Shard):
            before = Layout(layout.placements[:position])
            axes = Mesh(mesh.axes[:position])
            whole = local_type(type, before, axes, coordinate[:position]).shape[placement.dim]
            part = -(-whole // mesh.axes[position].size)
            offset[placement.dim] += min(part * coordinate[position], whole)
    return tuple(offset)
