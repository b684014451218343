"""Constraints that no placement can satisfy, found without search and named with their figures."""

from __future__ import annotations

import itertools
import math
from typing import NoReturn

import numpy as np

from ...compiler.ir.errors import InfeasibleError
from ...compiler.ir.workload import Workload
from .problem import PlacementProblem

__all__ = ["MEMORY_TOLERANCE", "allowed_kinds", "no_packing", "require_feasible"]

MEMORY_TOLERANCE = 1e-9  # relative; as in the evaluation, sums of sizes in another order
_MOST_KINDS = 10  # 2 ** kinds sets of kinds are checked for total memory


def allowed_kinds(problem: PlacementProblem) -> list[list[int]]:
    """Kinds that support each unit and hold it alone."""
    limits = problem.memory * (1 + MEMORY_TOLERANCE)
    allowed = np.isfinite(problem.times) & (problem.sizes[:, None] <= limits[None, :])
    return [np.flatnonzero(row).tolist() for row in allowed]


def require_feasible(workload: Workload, problem: PlacementProblem) -> None:
    """Raise what is certain to fail: a unit that fits on no device, or too little memory in all.

    Raises:
        InfeasibleError: names the operators or the memory, with figures.
    """
    allowed = allowed_kinds(problem)
    for unit, kinds in enumerate(allowed):
        if not kinds:
            _fits_nowhere(workload, problem, unit)
    _check_total_memory(workload, problem, allowed)


def no_packing(
    workload: Workload, problem: PlacementProblem, *, contiguous: bool, proven: bool
) -> InfeasibleError:
    """The error for memory that suffices in total, but into which the units cannot be divided."""
    held, limit = problem.sizes.sum(), (problem.memory * np.array(problem.counts)).sum()
    verb = "cannot be divided" if proven else "were not divided, in the time given,"
    pieces = " in contiguous pieces" if contiguous else ""
    return InfeasibleError(
        f"memory: {held:.0f} bytes of operators in {problem.num_units} inseparable groups"
        f" {verb} over {problem.num_devices} devices of {limit:.0f} bytes in total{pieces}",
        where="devices",
        ways_out=(
            "more devices, or devices with more memory",
            "fewer operators of one colour",
            *(("pieces that need not be contiguous",) if contiguous else ()),
            *(() if proven else ("a longer time limit",)),
        ),
    )


def _fits_nowhere(workload: Workload, problem: PlacementProblem, unit: int) -> NoReturn:
    names = [workload.operators[v].name for v in problem.members[unit]]
    group = _shortened(names)
    held = problem.sizes[unit]
    kinds = [workload.kinds[workload.kind_of[group[0]]] for group in problem.devices]
    reasons = [
        f"{kind.name} holds {kind.memory:.0f} bytes a device"
        if math.isfinite(problem.times[unit, k]) and kind.memory is not None
        else f"{kind.name} does not support "
        + _shortened(
            [
                n
                for n, v in zip(names, problem.members[unit], strict=True)
                if workload.operators[v].times[workload.kinds.index(kind)] is None
            ]
        )
        for k, kind in enumerate(kinds)
    ]
    together = "" if len(names) == 1 else " that must share a device"
    raise InfeasibleError(
        f"no device can take operators {group}{together}, {held:.0f} bytes: " + "; ".join(reasons),
        where=f"operator {names[0]!r}",
        ways_out=(
            "a device that supports them and has the memory",
            *(() if len(names) == 1 else ("other colours, so that they can be apart",)),
        ),
    )


def _check_total_memory(
    workload: Workload, problem: PlacementProblem, allowed: list[list[int]]
) -> None:
    """Units that only some kinds can take must fit into these kinds' memory together."""
    kinds = [k for k in range(len(problem.devices)) if math.isfinite(problem.memory[k])]
    masks = np.array([sum(1 << k for k in kinds_of) for kinds_of in allowed])
    most = len(kinds) if len(kinds) <= _MOST_KINDS else 1
    for number in range(1, most + 1):
        for chosen in itertools.combinations(kinds, number):
            mask = sum(1 << k for k in chosen)
            held = problem.sizes[(masks & ~mask) == 0].sum()
            limit = sum(problem.counts[k] * problem.memory[k] for k in chosen)
            if held > limit * (1 + MEMORY_TOLERANCE):
                names = [workload.kinds[workload.kind_of[problem.devices[k][0]]] for k in chosen]
                which = " and ".join(
                    f"{problem.counts[k]} {kind.name} of {problem.memory[k]:.0f}"
                    for k, kind in zip(chosen, names, strict=True)
                )
                raise InfeasibleError(
                    f"memory: operators that only these devices can take hold {held:.0f} bytes,"
                    f" the devices {limit:.0f} bytes ({which})",
                    where="devices",
                    ways_out=("more devices, or devices with more memory", "smaller operators"),
                )


def _shortened(names: list[str]) -> str:
    shown = ", ".join(map(repr, names[:3]))
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
