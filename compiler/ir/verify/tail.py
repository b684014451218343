"""Rules of the end of a training step: tied gradients, global norm, clipping, optimizer.

Every trained parameter that several ranks hold is all-reduced once over exactly those ranks, after
the last backward that adds to it. The norm is taken of complete gradients, counts each trained
parameter at one rank, and is summed over all ranks with parameters before clipping. The optimizer
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
    holders = _holders(programs)
    for program in programs:
        _verify_reductions(program, holders)
        _verify_optimizer(program)
    _verify_norms(programs, holders)


def _trained(program: Program) -> Iterator[tuple[int, str]]:
    """(stage, name) of the parameters with gradients that the rank holds."""
    for stage in program.stages:
        for value in stage.graph.values_of(ValueKind.PARAMETER):
            if value.requires_grad:
                yield stage.index, value.origin


def _holders(programs: tuple[Program, ...]) -> dict[str, tuple[int, ...]]:
    """Trained parameter -> ranks that hold a copy."""
    table: dict[str, dict[int, None]] = {}
    for program in programs:
        for _, name in _trained(program):
            table.setdefault(name, {})[program.rank] = None
    return {name: tuple(sorted(ranks)) for name, ranks in table.items()}


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


def _verify_reductions(program: Program, holders: dict[str, tuple[int, ...]]) -> None:
    stages: dict[str, set[int]] = {}
    for stage, name in _trained(program):
        stages.setdefault(name, set()).add(stage)
    reduced: set[str] = set()
    for position, item in enumerate(program.instructions):
        if not isinstance(item, AllReduce) or item.target == GRADIENT_NORM:
            continue
        if item.target not in stages:
            fail_at(program, position, f"the rank trains no parameter {item.target!r}")
        if item.ranks != holders[item.target]:
            fail_at(program, position, f"ranks {holders[item.target]} hold {item.target!r}")
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
            name in reduced or len(holders[name]) == 1,
            f"ranks {holders[name]} hold {name!r}, but its gradient is not reduced",
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


def _verify_norms(programs: tuple[Program, ...], holders: dict[str, tuple[int, ...]]) -> None:
    clipping = {program.rank: _clip(program) for program in programs}
    norms = set(clipping.values())
    active = [program for program in programs if program.stages]
    clips = {clipping[program.rank] for program in active}
    check(len(clips) <= 1, f"the ranks clip to different norms: {clipping}", "programs")
    if norms == {None}:
        return
    counted = [name for program in active for name in _verify_norm(program, active)]
    repeated = first_repeated(counted)
    check(repeated is None, f"two ranks count {repeated!r} in the norm", "programs")
    missing = sorted(set(holders) - set(counted))
    check(not missing, f"no rank counts {', '.join(missing)} in the norm", "programs")


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
