"""Rules of parameters that a rank updates less of than it holds (ZeRO).

The ranks of a `ReduceScatter` or `AllGather`, and those of an axis along which backward keeps parts
of a gradient, hold the same part of the parameter; each updates its share of that along one dim, by
the rule of `torch.chunk`, in the order in which the ranks are listed. Every updated part that is
less than what its rank holds is gathered once.
"""

from __future__ import annotations

from ..mesh import chunk_sizes
from ..program import AllGather, Program, ReduceScatter, TensorShard
from ..types import TensorType
from .report import check, fail_at

__all__ = ["verify_updates"]


def verify_updates(programs: tuple[Program, ...]) -> None:
    """Check every rule of the module docstring. Raises VerificationError."""
    held = {program.rank: _held(program) for program in programs}
    for program in programs:
        updates = {shard.name: shard for shard in program.updates}
        unknown = sorted(updates.keys() - program.trained().keys())
        here = f"program {program.rank}"
        check(not unknown, f"it updates parts of {unknown}, which it does not train", here)
        check(len(updates) == len(program.updates), "it updates two parts of a parameter", here)
        for stage in program.stages:
            for kept in stage.kept:
                where = f"gradient of {kept.name!r} in stage {stage.index} on rank {program.rank}"
                ranks = dict(stage.axes).get(kept.axis)
                check(ranks is not None, f"the stage has no mesh axis {kept.axis!r}", where)
                told = _share_error(held, updates, program.rank, kept.name, kept.dim, ranks or ())
                check(not told, told, where)
        gathered = _verify_collectives(program, held, updates)
        missing = sorted(updates.keys() - gathered)
        check(not missing, f"the parts of {missing} that it updates are not gathered", here)


def _held(program: Program) -> dict[str, tuple[tuple[int, ...], TensorType]]:
    """Offset and type of what the rank holds of each trained parameter."""
    offsets = {shard.name: shard.offset for shard in program.shards}
    return {
        name: (offsets.get(name, (0,) * len(value.type.shape)), value.type)
        for name, value in program.trained().items()
    }


def _verify_collectives(
    program: Program,
    held: dict[int, dict[str, tuple[tuple[int, ...], TensorType]]],
    updates: dict[str, TensorShard],
) -> set[str]:
    """Checks the shares of all collectives; the names of the parameters that are gathered."""
    kept = {part.name for stage in program.stages for part in stage.kept}
    gathered: set[str] = set()
    for position, item in enumerate(program.instructions):
        if not isinstance(item, ReduceScatter | AllGather):
            continue
        if len(item.dims) != len(item.targets):
            fail_at(program, position, f"{len(item.targets)} targets have {len(item.dims)} dims")
        for target, dim in zip(item.targets, item.dims, strict=True):
            told = _share_error(held, updates, program.rank, target, dim, item.ranks)
            if told:
                fail_at(program, position, told)
            if isinstance(item, ReduceScatter) and target in kept:
                fail_at(program, position, f"backward keeps only a part of {target!r} already")
            if isinstance(item, AllGather) and target in gathered:
                fail_at(program, position, f"{target!r} was gathered before")
            if isinstance(item, AllGather):
                gathered.add(target)
    return gathered


def _share_error(
    held: dict[int, dict[str, tuple[tuple[int, ...], TensorType]]],
    updates: dict[str, TensorShard],
    rank: int,
    name: str,
    dim: int,
    ranks: tuple[int, ...],
) -> str:
    """Why what `rank` updates of `name` is not its share among `ranks` along `dim`, if so."""
    others = {member: held[member].get(name) for member in ranks}
    if name not in updates:
        return f"rank {rank} updates all that it holds of {name!r}"
    different = [member for member, part in others.items() if part != held[rank][name]]
    if different:
        return f"ranks {different} do not hold the same part of {name!r} as rank {rank}"
    offset, type = held[rank][name]
    if not 0 <= dim < len(type.shape):
        return f"{type} has no dim {dim}"
    sizes = chunk_sizes(type.shape[dim], len(ranks))
    if min(sizes) < 1:
        return f"{len(ranks)} ranks cannot share dim {dim} of {type}"
    index = ranks.index(rank)
    shape = (*type.shape[:dim], sizes[index], *type.shape[dim + 1 :])
    begin = tuple(o + (sum(sizes[:index]) if d == dim else 0) for d, o in enumerate(offset))
    share = TensorShard(name, updates[name].whole, begin, TensorType(shape, type.dtype))
    mine = updates[name]
    if mine != share:
        told = f"rank {rank} updates {mine.part} of {name!r} at {mine.offset}"
        return f"{told}, its share among {ranks} is {share.part} at {share.offset}"
    return ""
