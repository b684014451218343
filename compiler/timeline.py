"""When each action of a schedule runs, from the times of its stages alone.

The ideal of a schedule: every action starts as soon as its rank is free and its inputs exist,
and nothing is spent on communication. It is what a measured step is compared with, and what
`explain` draws. (The event simulator of `cost_models` counts communication too.)
"""

from __future__ import annotations

from dataclasses import dataclass

from .ir.errors import VerificationError
from .ir.schedule import Action, ActionKind, Schedule

__all__ = ["Span", "draw_timeline", "ideal_seconds", "ideal_timeline"]

_GRADIENT_KINDS = (ActionKind.BACKWARD, ActionKind.BACKWARD_INPUT)


@dataclass(frozen=True, slots=True)
class Span:
    """One action, the rank that runs it, and when."""

    rank: int
    action: Action
    begin_seconds: float
    end_seconds: float


def ideal_seconds(
    schedule: Schedule, forward_seconds: tuple[float, ...], backward_seconds: tuple[float, ...]
) -> float:
    """Length of `ideal_timeline`."""
    spans = ideal_timeline(schedule, forward_seconds, backward_seconds)
    return max((span.end_seconds for span in spans), default=0.0)


def ideal_timeline(
    schedule: Schedule, forward_seconds: tuple[float, ...], backward_seconds: tuple[float, ...]
) -> tuple[Span, ...]:
    """Spans of all actions, in the order of ranks.

    Args:
        schedule: actions of each rank, in order.
        forward_seconds, backward_seconds: time of each stage for one microbatch; the two halves of
            a split backward take half of it each.

    Raises:
        VerificationError: the schedule waits for itself.
    """
    next_action = [0] * len(schedule.ranks)
    free = [0.0] * len(schedule.ranks)
    ends: dict[Action, float] = {}
    spans: list[list[Span]] = [[] for _ in schedule.ranks]
    progress = True
    while progress:
        progress = False
        for rank, actions in enumerate(schedule.ranks):
            while next_action[rank] < len(actions):
                action = actions[next_action[rank]]
                ready = _ready(action, ends, schedule.num_stages)
                if ready is None:
                    break
                begin = max(free[rank], ready)
                free[rank] = begin + _duration(action, forward_seconds, backward_seconds)
                ends[action] = free[rank]
                spans[rank].append(Span(rank, action, begin, free[rank]))
                next_action[rank] += 1
                progress = True
    for rank, actions in enumerate(schedule.ranks):
        if next_action[rank] < len(actions):
            raise VerificationError(
                f"{actions[next_action[rank]]} waits for an action that cannot run before it",
                where=f"schedule {schedule.name}, rank {rank}",
            )
    return tuple(span for row in spans for span in row)


def _ready(action: Action, ends: dict[Action, float], num_stages: int) -> float | None:
    """When the inputs of `action` exist; None: not yet known."""
    stage, microbatch = action.stage, action.microbatch
    times: list[float | None] = []
    if action.kind is ActionKind.FORWARD:
        if stage > 0:
            times.append(ends.get(Action(ActionKind.FORWARD, stage - 1, microbatch)))
    elif action.kind is ActionKind.BACKWARD_WEIGHT:
        times.append(ends.get(Action(ActionKind.BACKWARD_INPUT, stage, microbatch)))
    else:
        times.append(ends.get(Action(ActionKind.FORWARD, stage, microbatch)))
        if stage + 1 < num_stages:
            later = (ends.get(Action(kind, stage + 1, microbatch)) for kind in _GRADIENT_KINDS)
            times.append(next((time for time in later if time is not None), None))
    known = [time for time in times if time is not None]
    return max(known, default=0.0) if len(known) == len(times) else None


def _duration(
    action: Action, forward_seconds: tuple[float, ...], backward_seconds: tuple[float, ...]
) -> float:
    if action.kind is ActionKind.FORWARD:
        return forward_seconds[action.stage]
    share = 1.0 if action.kind is ActionKind.BACKWARD else 0.5
    return share * backward_seconds[action.stage]


def draw_timeline(spans: tuple[Span, ...], *, width: int = 96, max_ranks: int = 16) -> str:
    """Spans as one line of text a rank: `F3---` forward, `B3===` backward, `.` idle.

    Args:
        spans: as `ideal_timeline` returns them.
        width: columns for the whole time.
        max_ranks: ranks drawn; the others are counted in a last line.
    """
    total = max((span.end_seconds for span in spans), default=0.0)
    ranks = sorted({span.rank for span in spans})
    label = len(f"{ranks[-1]}") if ranks else 0
    rows = {rank: ["."] * width for rank in ranks[:max_ranks]}
    for span in spans:
        if span.rank in rows and total > 0.0:
            begin = round(span.begin_seconds / total * width)
            end = round(span.end_seconds / total * width)
            rows[span.rank][begin:end] = _cell(span.action, end - begin)
    lines = [f"rank {rank:>{label}} |{''.join(row)}|" for rank, row in rows.items()]
    if len(ranks) > max_ranks:
        lines.append(f"... and {len(ranks) - max_ranks} more ranks")
    return "\n".join(lines)


def _cell(action: Action, width: int) -> list[str]:
    fill = "-" if action.kind is ActionKind.FORWARD else "="
    text = f"{action.kind.value}{action.microbatch}"
    if len(text) > width:
        text = action.kind.value
    return list(text.ljust(width, fill)[:width])
