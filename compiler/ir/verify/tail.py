"""Rules of the end of a training step: tied gradients, global norm, clipping, optimizer.

Every trained parameter whose gradient has terms on several ranks is all-reduced once over exactly
those ranks, after the last backward that adds to it; copies in several stages are such terms. The
norm is taken of complete gradients, counts each part of a trained parameter at one rank, and is
summed over all ranks with parameters before clipping. The optimizer
step comes once, last.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..graph import Mode, ValueKind
from ..program import (
    GRADIENT_NORM,
    AllReduce,
    Backward,
    BackwardWeight,
    ClipGradients,
    Free,
    GradientNorm,
    OptimizerStep,
    Program,
)
from .report import check, fail_at, first_repeated

__all__ = ["verify_tails"]

_Tail = AllReduce | GradientNorm | ClipGradients | OptimizerStep


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
        _verify_reductions(program)
        _verify_optimizer(program)
    _verify_norms(programs)


def _trained(program: Program) -> Iterator[tuple[int, str]]:
    """(stage, name) of the parameters with gradients that the rank holds."""
    for stage in program.stages:
        for value in stage.graph.values_of(ValueKind.PARAMETER):
            if value.requires_grad:
                yield stage.index, value.origin


_Part = tuple[str, tuple[int, ...]]  # a trained parameter, and where the part of it begins


def _parts(program: Program) -> dict[str, _Part]:
    """The parts of trained parameters that the rank holds, by parameter."""
    offsets = {shard.name: shard.offset for shard in program.shards}
    return {name: (name, offsets.get(name, ())) for _, name in _trained(program)}


def _verify_terms(programs: tuple[Program, ...]) -> None:
    """Ranks agree on whose gradients are terms of one sum; they hold the same part, and copies of
    a parameter in several stages of a column are among them."""
    parts = {program.rank: _parts(program) for program in programs}
    terms = {program.rank: dict(program.gradient_terms) for program in programs}
    for program in programs:
        for name, ranks in terms[program.rank].items():
            here = f"terms of the gradient of {name!r} on rank {program.rank}"
            check(name in parts[program.rank], "the rank does not train it", here)
            check(program.rank in ranks, f"the rank is not among its own terms {ranks}", here)
            for other in ranks:
                theirs = terms.get(other, {}).get(name)
                check(theirs == ranks, f"they are {ranks} here and {theirs} on rank {other}", here)
                mine, part = parts[program.rank][name], parts[other].get(name)
                check(part == mine, f"rank {other} holds the part at {part}, not {mine}", here)
        for name in parts[program.rank]:
            copies = {rank for rank in program.stage_ranks if name in parts[rank]}
            known = set(terms[program.rank].get(name, (program.rank,)))
            check(
                copies <= known,
                f"ranks {tuple(sorted(copies))} of a column hold copies, but only {sorted(known)} "
                "sum their gradients",
                f"parameter {name!r} on rank {program.rank}",
            )


def _gradients_end(program: Program, stages: set[int]) -> int:
    """Position of the last instruction that adds to gradients of parameters of `stages`."""
    return max(
        (
            position
            for position, item in enumerate(program.instructions)
            if isinstance(item, (Backward, BackwardWeight)) and item.stage in stages
        ),
        default=-1,
    )


def _verify_reductions(program: Program) -> None:
    terms = dict(program.gradient_terms)
    stages: dict[str, set[int]] = {}
    for stage, name in _trained(program):
        stages.setdefault(name, set()).add(stage)
    reduced: set[str] = set()
    for position, item in enumerate(program.instructions):
        if not isinstance(item, AllReduce) or item.target == GRADIENT_NORM:
            continue
        if item.target not in stages:
            fail_at(program, position, f"the rank trains no parameter {item.target!r}")
        if item.ranks != terms.get(item.target):
            fail_at(
                program,
                position,
                f"ranks {terms.get(item.target, (program.rank,))} hold terms of {item.target!r}",
            )
        if item.reduction != "sum":
            fail_at(program, position, "copies' gradients are terms of a sum")
        if item.target in reduced:
            fail_at(program, position, f"{item.target!r} was reduced before")
        last = _gradients_end(program, stages[item.target])
        if position < last:
            fail_at(program, position, f"instruction {last} still adds to the gradient")
        reduced.add(item.target)
    for name in sorted(stages):
        check(
            name in reduced or name not in terms,
            f"ranks {terms.get(name)} hold {name!r}, but its gradient is not reduced",
            f"program {program.rank}",
        )


def _verify_optimizer(program: Program) -> None:
    steps = [
        position
        for position, item in enumerate(program.instructions)
        if isinstance(item, OptimizerStep)
    ]
    if not steps and not program.stages:
        return  # an idle rank has nothing to update
    check(len(steps) == 1, f"it has {len(steps)} optimizer steps, not 1", f"program {program.rank}")
    for position in range(steps[0] + 1, len(program.instructions)):
        if not isinstance(program.instructions[position], Free):
            fail_at(program, position, "it comes after the optimizer step")


def _verify_norms(programs: tuple[Program, ...]) -> None:
    clipping = {program.rank: _clip(program) for program in programs}
    norms = set(clipping.values())
    active = [program for program in programs if program.stages]
    clips = {clipping[program.rank] for program in active}
    check(len(clips) <= 1, f"the ranks clip to different norms: {clipping}", "programs")
    if norms == {None}:
        return
    counted = [
        _parts(program)[name] for program in active for name in _verify_norm(program, active)
    ]
    repeated = first_repeated(counted)
    check(repeated is None, f"two ranks count {_told(repeated)} in the norm", "programs")
    held = {part for program in active for part in _parts(program).values()}
    missing = ", ".join(map(_told, sorted(held - set(counted))))
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
        gradient = isinstance(item, AllReduce) and item.target != GRADIENT_NORM
        if not isinstance(item, (GradientNorm, AllReduce, ClipGradients)):
            continue
        if gradient and found:
            fail_at(program, position, "a gradient is reduced after the norm was taken")
        if not gradient:
            found.append((position, item))
    kinds = [type(item) for _, item in found]
    names = ", ".join(kind.__name__ for kind in expected)
    check(kinds == expected, f"clipping takes {names}, in this order and once each", here)
    own = {stage.index for stage in program.stages}
    last = _gradients_end(program, own)
    if found[0][0] < last:
        fail_at(program, found[0][0], f"instruction {last} still adds to gradients")
    ranks = tuple(other.rank for other in active)
    total = found[1][1]
    if isinstance(total, AllReduce) and (total.ranks != ranks or total.reduction != "sum"):
        fail_at(program, found[1][0], f"the norm is summed over the ranks with stages, {ranks}")
    norm = found[0][1]
    assert isinstance(norm, GradientNorm)
    trained = {name for _, name in _trained(program)}
    for name in norm.parameters:
        if name not in trained:
            fail_at(program, found[0][0], f"the rank trains no parameter {name!r}")
    return norm.parameters
