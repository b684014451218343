"""Plan, measure, plan again: until the choice is stable or a budget ends.

1. A plan is searched by the rates of the devices.
2. The parts of one rank's graph are measured, or looked up, for the plan and for the alternatives
   that come close to it. They correct the prices of their operators and, less surely, of operators
   like them (`cost_models/corrections.py`).
3. A plan is searched by what is known. If it or an alternative that comes close has parts that are
   not known, go on with 2; what an alternative has is looked at once.

So the plan in the end is one whose own parts were measured, and no alternative looked better by
guesses. Only the time of measuring counts against the budget: with the same database, the same
plan is found.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from ..cost_models.collectives import Network
from ..passes.columns import column_of
from ..passes.context import Context, PlanOptions
from .block_times import BlockTimes
from .capture import Captured
from .ir.errors import InfeasibleError
from .ir.graph import Graph
from .ir.mesh import Mesh
from .ir.plan import Alternative, Certificate, Objective, Plan, ProfileReport
from .words import seconds_text

if TYPE_CHECKING:
    from .planning import Planning

__all__ = ["search_measured"]

_MOST_ROUNDS = 4
_CLOSE = 1.3  # alternatives that are predicted to take so many times the step of the plan
_MOST_ALTERNATIVES = 2
_Found = tuple[Captured, Plan]


def search_measured(planning: Planning, options: PlanOptions, times: BlockTimes) -> _Found:
    """The fastest plan by measured times; `planning.cluster` is the corrected one afterwards.

    Raises:
        See `Planning.search`; RuntimeFailure: a worker failed.
    """
    planning.cluster = times.cluster
    first = found = planning.search_once(options)
    seen: set[tuple[Mesh, int]] = set()
    rounds, ended = 0, ""
    while not ended:
        known = times.num_parts
        complete = True
        for item in _leading(planning, found, options, seen):
            complete = _learn(item, options, times) and complete
        if times.num_parts == known:
            ended = "all that counts of the plan and of what comes close to it is measured"
            if times.warnings:
                ended += ", but for what could not be"
        elif rounds == _MOST_ROUNDS:
            ended = f"the choice was not stable after {rounds} rounds"
        else:
            rounds += 1
            planning.cluster = times.corrected()
            planning.say(f"plan again by measured times, round {rounds}")
            found = planning.search_once(options)
        if not complete:
            ended = "the time for measuring was over before all that was compared was measured"
    planning.say(f"{ended}: {seconds_text(times.spent_seconds)} of measuring")
    captured, plan = found
    report = ProfileReport(
        kind=times.kind,
        rounds=rounds,
        num_measured=times.num_measured,
        num_known=times.num_known,
        seconds=times.spent_seconds,
        ended=ended,
        changed=_changed(first[1], plan),
        first=_summary(first[1]),
        first_seconds=_seconds_on_mesh_of(planning, first[1], plan, options),
        blocks=times.blocks(*_local(found, options)),
    )
    return captured, replace(
        plan,
        profile=report,
        certificate=_named(plan, times),
        warnings=(*plan.warnings, *times.warnings),
    )


def _leading(
    planning: Planning, found: _Found, options: PlanOptions, seen: set[tuple[Mesh, int]]
) -> Iterator[_Found]:
    """The plan, and plans for the alternatives that come close to it and are not `seen` yet."""
    yield found
    plan = found[1]
    assert plan.prediction is not None
    limit = _CLOSE * plan.prediction.step_seconds
    seen.add((plan.mesh, plan.num_microbatches))
    close = [item for item in plan.alternatives if item.fits and item.step_seconds <= limit]
    for item in close[:_MOST_ALTERNATIVES]:
        key = item.mesh, item.num_microbatches
        other = None if key in seen else _plan_on(planning, item, options)
        seen.add(key)
        if other is not None:
            yield other


def _plan_on(planning: Planning, item: Alternative, options: PlanOptions) -> _Found | None:
    """The plan on the mesh of `item`; None if there is none after all."""
    try:
        return planning.search_once(
            replace(options, mesh=item.mesh, num_microbatches=item.num_microbatches)
        )
    except InfeasibleError:
        return None


def _local(found: _Found, options: PlanOptions) -> tuple[Graph, Mesh, Network | None]:
    """What the first rank runs of all stages, and who it meets."""
    captured, plan = found
    if plan.objective is not Objective.STEP:
        return captured.graph, Mesh(()), None
    column = column_of(plan, Context(captured.graph, options))
    return column.context.graph, plan.stage_mesh, column.context.network


def _learn(found: _Found, options: PlanOptions, times: BlockTimes) -> bool:
    return times.learn(*_local(found, options))


def _named(plan: Plan, times: BlockTimes) -> Certificate:
    """The certificate of `plan`, which says by what prices."""
    assert plan.certificate is not None
    space = f"{plan.certificate.search_space}; by the times of {times.kind} that were measured"
    return replace(plan.certificate, search_space=space)


def _summary(plan: Plan) -> Alternative:
    assert plan.prediction is not None
    return Alternative(
        mesh=plan.mesh,
        num_microbatches=plan.num_microbatches,
        zero=plan.zero_level,
        step_seconds=plan.prediction.step_seconds,
        fits=True,
    )


def _seconds_on_mesh_of(planning: Planning, first: Plan, plan: Plan, options: PlanOptions) -> float:
    """What a plan on the mesh of `first` is predicted to take by what was measured."""
    assert plan.prediction is not None
    if plan.mesh == first.mesh:
        return plan.prediction.step_seconds
    for item in plan.alternatives:
        if item.mesh == first.mesh:
            return item.step_seconds
    other = _plan_on(planning, _summary(first), options)
    assert other is not None and other[1].prediction is not None, "it was planned before"
    return other[1].prediction.step_seconds


def _changed(before: Plan, after: Plan) -> tuple[str, ...]:
    """What differs between two plans."""
    pairs = {
        "mesh": (before.mesh, after.mesh),
        "microbatches": (before.num_microbatches, after.num_microbatches),
        "stages": (
            [(stage.devices, len(stage.nodes)) for stage in before.stages],
            [(stage.devices, len(stage.nodes)) for stage in after.stages],
        ),
        "layouts": (
            (before.node_layouts, before.parameter_layouts),
            (after.node_layouts, after.parameter_layouts),
        ),
        "schedule": (before.schedule, after.schedule),
    }
    return tuple(name for name, (old, new) in pairs.items() if old != new)
