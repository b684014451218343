"""Rules of the end of a training step: sums of gradients, global norm, clipping, update.

The weight gradients of a microbatch may be computed in parts; a part completes the gradients that
its stage names for it, the last one also all others.

A trained parameter's gradient is summed once over exactly the ranks whose gradients are its terms:
by the backward of its stage, a `ReduceScatter` that leaves each rank the part that it updates, an
`AllReduce` of that part, or several of these one after the other. Copies in several stages are
terms, too. This happens after the last backward that adds to the gradient and before what needs it.
The norm is taken of complete gradients, counts each part of a trained parameter at one rank, and is
summed over all ranks with parameters before clipping. The optimizer step comes once; after it, each
updated part goes to all ranks that hold more than it.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..graph import Mode, ValueKind
from ..program import (
    GRADIENT_NORM,
    AllGather,
    AllReduce,
    Await,
    Backward,
    BackwardWeight,
    ClipGradients,
    Collective,
    Free,
    GradientNorm,
    OptimizerStep,
    Program,
    ReduceScatter,
)
from .report import check, fail_at, first_repeated
from .updates import verify_updates

__all__ = ["verify_tails"]

_Tail = Collective | GradientNorm | ClipGradients | OptimizerStep


def verify_tails(programs: tuple[Program, ...]) -> None:
    """Check every rule of the module docstring. Raises VerificationError."""
    if programs[0].mode is Mode.INFER:
        for program in programs:
            for position, item in enumerate(program.instructions):
                if isinstance(item, _Tail):
                    fail_at(program, position, "an inference program changes parameters")
        return
    _verify_terms(programs)
    for program in programs:
        _verify_parts(program)
        _verify_order(program)
        _verify_optimizer(program)
    verify_updates(programs)
    _verify_sums(programs)
    _verify_norms(programs)


_Part = tuple[str, tuple[int, ...]]  # a trained parameter, and where the part of it begins


def _held_parts(program: Program) -> dict[str, _Part]:
    """The parts of trained parameters that the rank holds, by parameter."""
    offsets = {shard.name: shard.offset for shard in program.shards}
    return {name: (name, offsets.get(name, ())) for name in program.trained()}


def _updated_parts(program: Program) -> dict[str, _Part]:
    """The parts of trained parameters that the rank updates, by parameter."""
    updates = {shard.name: (shard.name, shard.offset) for shard in program.updates}
    return _held_parts(program) | updates


def _verify_terms(programs: tuple[Program, ...]) -> None:
    """Ranks agree on whose gradients are terms of one sum; they hold the same part, and copies of
    a parameter in several stages of a column are among them."""
    parts = {program.rank: _held_parts(program) for program in programs}
    terms = {program.rank: dict(program.gradient_terms) for program in programs}
    for program in programs:
        rank = program.rank
        for name, ranks in terms[rank].items():
            here = f"terms of the gradient of {name!r} on rank {rank}"
            check(name in parts[rank], "the rank does not train it", here)
            check(rank in ranks, f"the rank is not among its own terms {ranks}", here)
            mine = parts[rank][name]
            for other in ranks:
                theirs, part = terms.get(other, {}).get(name), parts.get(other, {}).get(name)
                if theirs != ranks:
                    check(False, f"they are {ranks} here and {theirs} on rank {other}", here)
                if part != mine:
                    check(False, f"rank {other} holds the part at {part}, not {mine}", here)
        for name in parts[rank]:
            copies = {other for other in _tied_to(program, programs) if name in parts[other]}
            known = set(terms[rank].get(name, (rank,)))
            if not copies <= known:
                check(
                    False,
                    f"ranks {tuple(sorted(copies))} of a column hold copies, but only "
                    f"{sorted(known)} sum their gradients",
                    f"parameter {name!r} on rank {rank}",
                )


def _tied_to(program: Program, programs: tuple[Program, ...]) -> Iterator[int]:
    """Ranks whose copies of a parameter belong to those of `program`: of its column, or, where
    stages have meshes of their own, of all other stages."""
    if program.stage_ranks:
        yield from program.stage_ranks
        return
    own = {stage.index for stage in program.stages}
    for other in programs:
        if own.isdisjoint(stage.index for stage in other.stages):
            yield other.rank


def _verify_parts(program: Program) -> None:
    """Parts of the weight gradients complete gradients of their stage, each once."""
    for stage in program.stages:
        here = f"parts of stage {stage.index} on rank {program.rank}"
        trained = {v.origin for v in stage.graph.values_of(ValueKind.PARAMETER) if v.requires_grad}
        names = [name for part in stage.parts for name in part]
        unknown = sorted(set(names) - trained)
        check(not unknown, f"the stage does not train {unknown}", here)
        repeated = first_repeated(names)
        check(repeated is None, f"two of them complete the gradient of {repeated!r}", here)


def _gradient_ends(program: Program) -> dict[str, int]:
    """By trained parameter, position of the last instruction that adds to its gradient."""
    ends: dict[str, int] = {}
    added: dict[tuple[int, int | None], list[str]] = {}  # by stage and part
    for stage in program.stages:
        names = [value.origin for value in stage.graph.values_of(ValueKind.PARAMETER)]
        ends.update((name, -1) for name in names if name not in ends)
        early = {name for part in stage.parts[:-1] for name in part}
        added[stage.index, None] = names
        added.update(((stage.index, k), list(part)) for k, part in enumerate(stage.parts[:-1]))
        added[stage.index, len(stage.parts) - 1] = [name for name in names if name not in early]
    for position, item in enumerate(program.instructions):
        if isinstance(item, (Backward, BackwardWeight)):
            part = item.part if isinstance(item, BackwardWeight) else None
            ends.update(dict.fromkeys(added.get((item.stage, part), ()), position))
    return ends


def _reductions(program: Program) -> Iterator[tuple[int, AllReduce | ReduceScatter, str]]:
    """(position, instruction, parameter) of each sum of a gradient."""
    for position, item in enumerate(program.instructions):
        if isinstance(item, AllReduce | ReduceScatter):
            for target in item.targets:
                if target != GRADIENT_NORM:
                    yield position, item, target


def _verify_order(program: Program) -> None:
    """Each gradient is complete on the rank before it is reduced, scattered before the rest."""
    trained = program.trained()
    ends = _gradient_ends(program)
    kinds: dict[str, list[type]] = {}
    for position, item, target in _reductions(program):
        if target not in trained:
            fail_at(program, position, f"the rank trains no parameter {target!r}")
        if isinstance(item, AllReduce) and item.reduction != "sum":
            fail_at(program, position, "copies' gradients are terms of a sum")
        before = kinds.setdefault(target, [])
        if type(item) in before or AllReduce in before:
            fail_at(program, position, f"{target!r} was reduced before")
        before.append(type(item))
        last = ends[target]
        if position < last:
            fail_at(program, position, f"instruction {last} still adds to the gradient")


def _verify_sums(programs: tuple[Program, ...]) -> None:
    """Every gradient ends as the sum of all its terms, each counted once."""
    summed = {
        (program.rank, name): ranks
        for program in programs
        for name, ranks in _summed_in_backward(program).items()
    }
    for kind in (ReduceScatter, AllReduce):
        before = dict(summed)
        for program in programs:
            for position, item, target in _reductions(program):
                if not isinstance(item, kind):
                    continue
                found = [before.get((rank, target), frozenset()) for rank in item.ranks]
                total = frozenset().union(*found)
                if len(total) < sum(map(len, found)) or frozenset() in found:
                    fail_at(program, position, f"terms of {target!r} are missing or counted twice")
                summed[program.rank, target] = total
    for program in programs:
        terms = dict(program.gradient_terms)
        last = {target: position for position, _, target in _reductions(program)}
        for name in program.trained():
            wanted = terms.get(name, (program.rank,))
            if summed[program.rank, name] == frozenset(wanted):
                continue
            if name in last:
                fail_at(program, last[name], f"ranks {wanted} hold terms of {name!r}")
            check(
                False,
                f"ranks {wanted} hold {name!r}, but its gradient is not reduced",
                f"program {program.rank}",
            )


def _summed_in_backward(program: Program) -> dict[str, frozenset[int]]:
    """By trained parameter, ranks whose terms are in the gradient that the rank accumulates."""
    table = dict.fromkeys(program.trained(), frozenset([program.rank]))
    for stage in reversed(program.stages):
        axes = dict(stage.axes)
        for part in reversed(stage.kept):
            if part.summed and part.name in table:
                table[part.name] = frozenset(axes.get(part.axis, ()))
    return table


def _verify_optimizer(program: Program) -> None:
    steps = [
        position
        for position, item in enumerate(program.instructions)
        if isinstance(item, OptimizerStep)
    ]
    if not steps and not program.stages:
        return  # an idle rank has nothing to update
    check(len(steps) == 1, f"it has {len(steps)} optimizer steps, not 1", f"program {program.rank}")
    for position, item in enumerate(program.instructions):
        if position > steps[0] and not isinstance(item, Free | AllGather | Await):
            fail_at(program, position, "it comes after the optimizer step")
        if position < steps[0] and isinstance(item, AllGather):
            fail_at(program, position, "it comes before the optimizer step")


def _verify_norms(programs: tuple[Program, ...]) -> None:
    clipping = {program.rank: _clip(program) for program in programs}
    norms = set(clipping.values())
    active = [program for program in programs if program.stages]
    clips = {clipping[program.rank] for program in active}
    check(len(clips) <= 1, f"the ranks clip to different norms: {clipping}", "programs")
    if norms == {None}:
        return
    counted = [
        _updated_parts(program)[name]
        for program in active
        for name in _verify_norm(program, active)
    ]
    repeated = first_repeated(counted)
    check(repeated is None, f"two ranks count {_told(repeated)} in the norm", "programs")
    updated = {part for program in active for part in _updated_parts(program).values()}
    missing = ", ".join(map(_told, sorted(updated - set(counted))))
    check(not missing, f"no rank counts {missing} in the norm", "programs")


def _told(part: _Part | None) -> str:
    if part is None:
        return ""
    name, offset = part
    return f"{name!r} at {offset}" if offset else repr(name)


def _clip(program: Program) -> float | None:
    found = [item for item in program.instructions if isinstance(item, ClipGradients)]
    check(len(found) <= 1, "it clips gradients twice", f"program {program.rank}")
    return found[0].max_norm if found else None


def _verify_norm(program: Program, active: list[Program]) -> tuple[str, ...]:
    """Order of norm, its sum over ranks and clipping; returns the parameters counted."""
    here = f"program {program.rank}"
    expected = [GradientNorm, AllReduce, ClipGradients]
    if len(active) == 1:
        expected.remove(AllReduce)
    found: list[tuple[int, GradientNorm | AllReduce | ClipGradients]] = []
    for position, item in enumerate(program.instructions):
        is_norm = isinstance(item, AllReduce) and item.targets == (GRADIENT_NORM,)
        if isinstance(item, (AllReduce, ReduceScatter)) and not is_norm and found:
            fail_at(program, position, "a gradient is reduced after the norm was taken")
        if isinstance(item, (GradientNorm, ClipGradients)) or is_norm:
            assert isinstance(item, GradientNorm | AllReduce | ClipGradients)
            found.append((position, item))
    kinds = [type(item) for _, item in found]
    names = ", ".join(kind.__name__ for kind in expected)
    check(kinds == expected, f"clipping takes {names}, in this order and once each", here)
    last = max(_gradient_ends(program).values(), default=-1)
    if found[0][0] < last:
        fail_at(program, found[0][0], f"instruction {last} still adds to gradients")
    ranks = tuple(other.rank for other in active)
    total = found[1][1]
    if isinstance(total, AllReduce) and (total.ranks != ranks or total.reduction != "sum"):
        fail_at(program, found[1][0], f"the norm is summed over the ranks with stages, {ranks}")
    norm = found[0][1]
    assert isinstance(norm, GradientNorm)
    for name in norm.parameters:
        if name not in program.trained():
            fail_at(program, found[0][0], f"the rank trains no parameter {name!r}")
    return norm.parameters
