"""Rules of the parts of tensors that ranks hold, and of values that cross the bounds of stages.

They lie inside the whole, are of the type that the stages of the rank compute with, and together,
on the ranks of each stage, are all of it, each once. Along an axis they follow one another in the
order of the ranks, as collectives and the other operands of an operator take them to.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

from ..graph import ValueKind
from ..program import Program, TensorShard
from .rectangles import overlap
from .report import check, first_repeated

__all__ = ["verify_shards"]


def verify_shards(programs: tuple[Program, ...]) -> None:
    """Check every rule of the module docstring. Raises VerificationError."""
    holders: dict[tuple[int, str], _Holders] = {}
    for program in programs:
        for key, shard in (*_verify_program(program).items(), *_crossing(program)):
            holders.setdefault(key, {})[program.rank] = shard
    lines = {
        (stage.index, ranks) for p in programs for stage in p.stages for _, ranks in stage.axes
    }
    for (stage, name), held in holders.items():
        _verify_cover(name, held)
        for index, ranks in lines:
            if index == stage and held.get(ranks[0]) is not None:
                _verify_line(name, ranks, held)


_Holders = dict[int, TensorShard | None]  # by rank; None: the whole


def _crossing(program: Program) -> Iterator[tuple[tuple[int, str], TensorShard]]:
    """The parts of boundary values by stage and name."""
    here = f"boundaries of rank {program.rank}"
    for stage in program.stages:
        repeated = first_repeated(shard.name for shard in stage.boundaries)
        check(repeated is None, f"stage {stage.index} has two parts of %{repeated}", here)
        for shard in stage.boundaries:
            _verify_bounds(shard, here)
            yield (stage.index, f"%{shard.name}"), shard


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


def _verify_line(name: str, ranks: tuple[int, ...], held: _Holders) -> None:
    """Along an axis all ranks hold the same part, or one after the other along one dim."""
    offsets = [shard.offset for shard in map(held.get, ranks) if shard is not None]
    moving = [places for places in zip(*offsets, strict=True) if len(set(places)) > 1]
    in_order = len(moving) <= 1 and all(list(p) == sorted(set(p)) for p in moving)
    told = f"they begin at {offsets} on ranks {ranks}, which is not their order along one dim"
    check(in_order, told, f"parts of {name!r}")


def _verify_cover(name: str, held: _Holders) -> None:
    here = f"parts of {name!r}"
    parts = {shard: rank for rank, shard in held.items()}
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
