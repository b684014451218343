"""When each action of a schedule runs, from the times of its stages alone.

The ideal of a schedule: every action starts as soon as its rank is free and its inputs exist,
and nothing is spent on communication or the optimizer. It is what a measured step is compared
with, and all that a plan file without its model can be simulated by; `cost_models.simulate` takes
the programs and counts the rest.
"""

from __future__ import annotations

from collections import defaultdict

from ..cost_models.simulator import Simulation, Span
from .ir.errors import VerificationError
from .ir.schedule import Action, ActionKind, Schedule
from .ir.trace import Lane, TraceEvent

__all__ = ["ideal_seconds", "ideal_simulation"]

_GRADIENT_KINDS = (ActionKind.BACKWARD, ActionKind.BACKWARD_INPUT)


def ideal_seconds(
    schedule: Schedule,
    forward_seconds: tuple[float, ...],
    backward_seconds: tuple[float, ...],
    input_shares: tuple[float, ...] | None = None,
) -> float:
    """Length of a step in `ideal_simulation`."""
    simulation = ideal_simulation(schedule, forward_seconds, backward_seconds, input_shares)
    return simulation.step_seconds


def ideal_simulation(
    schedule: Schedule,
    forward_seconds: tuple[float, ...],
    backward_seconds: tuple[float, ...],
    input_shares: tuple[float, ...] | None = None,
    edges: tuple[tuple[int, int], ...] | None = None,
) -> Simulation:
    """The course of one step; memory and links, which a schedule does not tell, are left empty.

    Args:
        schedule: actions of each rank, in order.
        forward_seconds, backward_seconds: time of each stage for one microbatch.
        input_shares: of each stage, the part of a split backward that computes the gradients of
            its inputs; None: half of it.
        edges: (stage, later stage that waits for it); None: a chain.

    Raises:
        VerificationError: the schedule waits for itself.
    """
    chain = tuple((stage, stage + 1) for stage in range(schedule.num_stages - 1))
    waits = _Waits(chain if edges is None else edges)
    next_action = [0] * len(schedule.ranks)
    free = [0.0] * len(schedule.ranks)
    busy = [0.0] * len(schedule.ranks)
    ends: dict[Action, float] = {}
    spans: list[Span] = []
    progress = True
    while progress:
        progress = False
        for rank, actions in enumerate(schedule.ranks):
            while next_action[rank] < len(actions):
                action = actions[next_action[rank]]
                ready = waits.ready(action, ends)
                if ready is None:
                    break
                begin = max(free[rank], ready)
                length = _duration(action, forward_seconds, backward_seconds, input_shares)
                ends[action] = free[rank] = begin + length
                busy[rank] += length
                spans.append(_span(rank, action, begin, free[rank]))
                next_action[rank] += 1
                progress = True
    for rank, actions in enumerate(schedule.ranks):
        if next_action[rank] < len(actions):
            raise VerificationError(
                f"{actions[next_action[rank]]} waits for an action that cannot run before it",
                where=f"schedule {schedule.name}, rank {rank}",
            )
    acting = [seconds for seconds, actions in zip(busy, schedule.ranks, strict=True) if actions]
    return _simulation(spans, max(free, default=0.0), acting)


def _simulation(spans: list[Span], step_seconds: float, busy: list[float]) -> Simulation:
    shares = tuple(seconds / step_seconds if step_seconds else 0.0 for seconds in busy)
    return Simulation(
        step_seconds=step_seconds,
        bubble_fraction=1.0 - sum(shares) / len(shares) if step_seconds else 0.0,
        busy_fraction=shares,
        link_bytes=(),
        peak_memory_bytes=(),
        memory_curves=(),
        timeline=tuple(sorted(spans, key=lambda span: (span.rank, span.begin_seconds))),
        events=tuple(
            TraceEvent(
                span.rank,
                Lane.COMPUTE,
                f"{span.kind} {span.stage}.{span.microbatch}",
                span.begin_seconds,
                span.end_seconds,
            )
            for span in spans
        ),
    )


def _span(rank: int, action: Action, begin: float, end: float) -> Span:
    return Span(rank, action.kind.value, action.stage, action.microbatch, begin, end)


class _Waits:
    """Which actions an action waits for."""

    def __init__(self, edges: tuple[tuple[int, int], ...]) -> None:
        self._before: dict[int, list[int]] = defaultdict(list)
        self._after: dict[int, list[int]] = defaultdict(list)
        for source, target in edges:
            self._before[target].append(source)
            self._after[source].append(target)

    def ready(self, action: Action, ends: dict[Action, float]) -> float | None:
        """When the inputs of `action` exist; None: not yet known."""
        stage, microbatch = action.stage, action.microbatch
        times: list[float | None] = []
        if action.kind is ActionKind.FORWARD:
            times += [
                ends.get(Action(ActionKind.FORWARD, before, microbatch))
                for before in self._before[stage]
            ]
        elif action.kind is ActionKind.BACKWARD_WEIGHT:
            times.append(ends.get(Action(ActionKind.BACKWARD_INPUT, stage, microbatch)))
        else:
            times.append(ends.get(Action(ActionKind.FORWARD, stage, microbatch)))
            for after in self._after[stage]:
                later = (ends.get(Action(kind, after, microbatch)) for kind in _GRADIENT_KINDS)
                times.append(next((time for time in later if time is not None), None))
        known = [time for time in times if time is not None]
        return max(known, default=0.0) if len(known) == len(times) else None


def _duration(
    action: Action,
    forward_seconds: tuple[float, ...],
    backward_seconds: tuple[float, ...],
    input_shares: tuple[float, ...] | None,
) -> float:
    if action.kind is ActionKind.FORWARD:
        return forward_seconds[action.stage]
    share = 1.0
    if action.kind is not ActionKind.BACKWARD:
        first = input_shares[action.stage] if input_shares else 0.5
        share = first if action.kind is ActionKind.BACKWARD_INPUT else 1.0 - first
    return share * backward_seconds[action.stage]
