"""The usual hand-written strategies, priced in the same model as the plan that was chosen.

    ddp     data=N, parameters replicated
    fsdp    data=N, ZeRO-3
    tp      tensor=N
    pp      pipeline=N

Each is planned with its mesh pinned, at its best: layouts, stages and microbatches are searched as
for the chosen plan. One that does not fit is planned once more as if memory were no limit, so that
the table says what it would need.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from ..passes.context import PlanOptions
from .ir.cluster import Cluster
from .ir.errors import CutsetError, InfeasibleError, UsageError
from .ir.mesh import Mesh, MeshAxis
from .ir.plan import DATA, PIPELINE, TENSOR, Plan
from .planning import Planning
from .words import bytes_text, seconds_text

__all__ = [
    "STRATEGIES",
    "StrategyFigures",
    "check_strategies",
    "compare",
    "render_comparison",
    "strategies_named",
]

CHOSEN = "chosen"
STRATEGIES = ("ddp", "fsdp", "tp", "pp")
_PINNED = {  # name -> (axis over all devices, level of ZeRO)
    "ddp": (DATA, 0),
    "fsdp": (DATA, 3),
    "tp": (TENSOR, 0),
    "pp": (PIPELINE, 0),
}
_NO_LIMIT_BYTES = 1 << 50


@dataclass(frozen=True, slots=True)
class StrategyFigures:
    """One row of the comparison; figures of a strategy that cannot be planned are None.

    Args:
        memory_bytes: of the fullest device, whose limit is `limit_bytes`.
        note: why it cannot be planned.
    """

    name: str
    mesh: str
    zero: int
    num_microbatches: int | None
    step_seconds: float | None
    memory_bytes: int | None
    limit_bytes: int | None
    fits: bool
    note: str = ""


def strategies_named(text: str) -> tuple[str, ...]:
    """The strategies of a list with commas.

    Raises:
        UsageError: it names none, or one that there is not.
    """
    names = tuple(name for part in text.split(",") if (name := part.strip()))
    if not names:
        raise UsageError(
            f"{text!r} names no strategy",
            where="compare",
            ways_out=(f"some of: {', '.join(STRATEGIES)}, with commas between",),
        )
    check_strategies(names)
    return names


def check_strategies(names: Iterable[str]) -> None:
    """Raises UsageError where one of `names` is no strategy."""
    for name in names:
        if name not in _PINNED:
            raise UsageError(
                f"there is no strategy called {name!r}",
                where="compare",
                ways_out=(f"one of: {', '.join(STRATEGIES)}",),
            )


def compare(
    planning: Planning, chosen: Plan, options: PlanOptions, names: Iterable[str] = STRATEGIES
) -> tuple[StrategyFigures, ...]:
    """Figures of the `chosen` plan, then of each strategy in `names`.

    Args:
        options: under which the plan was chosen; mesh, stages and ZeRO are the strategy's own.

    Raises:
        UsageError: there is no such strategy.
    """
    names = tuple(names)
    check_strategies(names)
    rows = [_figures(CHOSEN, chosen, planning.cluster)]
    for name in names:
        axis, level = _PINNED[name]
        mesh = Mesh((MeshAxis(axis, len(planning.cluster.devices)),))
        pinned = replace(
            options,
            mesh=mesh,
            zero=level,
            offload="none",
            num_stages=None,
            pins=(),
            device_pins=(),
        )
        rows.append(_strategy(planning, name, pinned))
    return tuple(rows)


def _strategy(planning: Planning, name: str, options: PlanOptions) -> StrategyFigures:
    try:
        return _figures(name, planning.search(options)[1], planning.cluster)
    except InfeasibleError as error:
        unlimited = replace(planning, cluster=_without_limit(planning.cluster))
        free = replace(options, memory_limit_bytes=None)
        cause = error.cause
    except UsageError as error:
        return _impossible(name, options, error)
    try:
        found = _figures(name, unlimited.search(free)[1], planning.cluster)
    except InfeasibleError:
        return replace(_impossible(name, options, error=None), note=cause)
    return replace(found, fits=False)


def _without_limit(cluster: Cluster) -> Cluster:
    types = tuple(replace(entry, memory_bytes=_NO_LIMIT_BYTES) for entry in cluster.types)
    return replace(cluster, types=types)


def _figures(name: str, plan: Plan, cluster: Cluster) -> StrategyFigures:
    """Figures of `plan` on the devices of `cluster`."""
    assert plan.prediction is not None
    limits = {entry.device: cluster.type_of(entry.device) for entry in plan.prediction.memory}
    fullest = max(
        plan.prediction.memory,
        key=lambda entry: entry.total_bytes / limits[entry.device].memory_bytes,
    )
    limit = limits[fullest.device].memory_bytes
    return StrategyFigures(
        name=name,
        mesh=str(plan.mesh) or "one device",
        zero=plan.zero_level,
        num_microbatches=plan.num_microbatches,
        step_seconds=plan.objective_seconds,
        memory_bytes=fullest.total_bytes,
        limit_bytes=limit,
        fits=fullest.total_bytes <= limit,
    )


def _impossible(name: str, options: PlanOptions, error: CutsetError | None) -> StrategyFigures:
    note = error.cause if error is not None else ""
    return StrategyFigures(
        name, str(options.mesh), options.zero or 0, None, None, None, None, False, note
    )


def render_comparison(rows: Iterable[StrategyFigures]) -> str:
    """The comparison as a table."""
    head = (
        f"{'strategy':<9} {'mesh':<28} {'ZeRO':>4} {'micro':>6} {'step':>10} {'memory':>22}  fits"
    )
    lines = [head]
    for row in rows:
        start = f"{row.name:<9} {row.mesh:<28} {row.zero:>4}"
        if row.step_seconds is None or row.memory_bytes is None or row.limit_bytes is None:
            lines.append(f"{start}  {row.note}")
            continue
        memory = f"{bytes_text(row.memory_bytes)} of {bytes_text(row.limit_bytes)}"
        lines.append(
            f"{start} {row.num_microbatches:>6} {seconds_text(row.step_seconds):>10} {memory:>22}  "
            f"{'yes' if row.fits else 'no'}"
        )
    return "\n".join(lines)
