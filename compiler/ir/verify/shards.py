"""Rules of the parts of tensors that ranks hold: inside the whole, of the type that the stages of
the rank compute with, and together, on the ranks of each stage, each once, all of it."""

from __future__ import annotations

import itertools
import math

from ..graph import ValueKind
from ..program import Program, TensorShard
from .rectangles import overlap
from .report import check, first_repeated

__all__ = ["verify_shards"]


def verify_shards(programs: tuple[Program, ...]) -> None:
    """Check every rule of the module docstring. Raises VerificationError."""
    holders: dict[tuple[int, str], list[tuple[int, TensorShard | None]]] = {}
    for program in programs:
        for key, shard in _verify_program(program).items():
            holders.setdefault(key, []).append((program.rank, shard))
    for (_, name), held in holders.items():
        _verify_cover(name, held)


def _verify_program(program: Program) -> dict[tuple[int, str], TensorShard | None]:
    """What the rank holds by stage and name; None: the whole."""
    here = f"parts of rank {program.rank}"
    repeated = first_repeated(shard.name for shard in program.shards)
    check(repeated is None, f"it holds two parts of {repeated!r}", here)
    shards = {shard.name: shard for shard in program.shards}
    for shard in program.shards:
        _verify_bounds(shard, here)
    held: dict[tuple[int, str], TensorShard | None] = {}
    for stage in program.stages:
        for value in stage.graph.values:
            if value.kind in (ValueKind.RESULT, ValueKind.BOUNDARY):
                continue
            part = shards.get(value.origin)
            told = f"stage {stage.index} computes with {value.type} of {value.origin!r}"
            check(part is None or part.part == value.type, f"{told}, it holds {part}", here)
            held[stage.index, value.origin] = part
    unknown = sorted(shards.keys() - {name for _, name in held})
    check(not unknown, f"no stage reads {unknown}, of which it holds parts", here)
    return held


def _verify_bounds(shard: TensorShard, here: str) -> None:
    whole, part = shard.whole, shard.part
    alike = part.dtype == whole.dtype and len(part.shape) == len(whole.shape) == len(shard.offset)
    check(alike, f"{part} at {shard.offset} is no part of {shard.name!r}, {whole}", here)
    inside = all(
        begin >= 0 and size > 0 and begin + size <= total
        for begin, size, total in zip(shard.offset, part.shape, whole.shape, strict=True)
    )
    check(inside, f"{part} at {shard.offset} reaches out of {shard.name!r}, {whole}", here)


def _verify_cover(name: str, held: list[tuple[int, TensorShard | None]]) -> None:
    here = f"parts of {name!r}"
    parts = {shard: rank for rank, shard in held}
    if set(parts) == {None}:
        return
    whole = parts.get(None)
    check(whole is None, f"rank {whole} holds all of it, others a part", here)
    found = [shard for shard in parts if shard is not None]
    wholes = {shard.whole for shard in found}
    check(len(wholes) == 1, f"they are of {', '.join(map(str, wholes))}", here)
    for one, two in itertools.combinations(found, 2):
        told = f"those of ranks {parts[one]} and {parts[two]} overlap"
        boxes = ((item.offset, item.part.shape) for item in (one, two))
        check(not overlap(*boxes), told, here)
    size = sum(math.prod(shard.part.shape) for shard in found)
    total = math.prod(found[0].whole.shape)
    check(size == total, f"they have {size} of its {total} elements", here)
