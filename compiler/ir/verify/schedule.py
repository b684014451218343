"""Rules of a `Schedule`: every action once, on one rank, in an order that can be executed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ..errors import VerificationError
from ..graph import Mode
from ..schedule import Action, ActionKind, Schedule
from .report import check
from .waits import Wait, find_deadlock

__all__ = ["verify_schedule"]

_FORWARD, _BACKWARD = ActionKind.FORWARD, ActionKind.BACKWARD
_INPUT, _WEIGHT = ActionKind.BACKWARD_INPUT, ActionKind.BACKWARD_WEIGHT


def verify_schedule(
    schedule: Schedule, *, mode: Mode, edges: Iterable[tuple[int, int]] | None = None
) -> None:
    """Check every rule of the level.

    Each stage runs on one rank; per microbatch it has one F and, when training, either one B or
    one I and then one W, after F. A stage takes the microbatches of each kind in ascending order
    (buffers change in that order). No rank waits for ever, given that F(s) needs F of the stages
    before it and B(s) or I(s) needs B or I of the stages after it.

    Args:
        edges: pairs of stages (earlier, later) that exchange values; by default a chain.

    Raises:
        VerificationError: the first rule that is broken; a deadlock is printed as its cycle.
    """
    here = f"schedule {schedule.name}"
    check(schedule.num_stages >= 1, "there are no stages", here)
    check(schedule.num_microbatches >= 1, "there are no microbatches", here)
    places = _places(schedule, mode)
    _verify_complete(schedule, mode, places)
    chain = ((stage, stage + 1) for stage in range(schedule.num_stages - 1))
    _verify_progress(schedule, places, tuple(chain if edges is None else edges))


def _places(schedule: Schedule, mode: Mode) -> dict[Action, tuple[int, int]]:
    """(rank, position) of each action, while checking that none is out of range or repeated."""
    places: dict[Action, tuple[int, int]] = {}
    stage_rank: dict[int, int] = {}
    latest: dict[tuple[ActionKind, int], int] = {}
    for rank, actions in enumerate(schedule.ranks):
        for position, action in enumerate(actions):
            home = stage_rank.setdefault(action.stage, rank)
            before = latest.get((action.kind, action.stage), -1)
            cause = ""
            if not 0 <= action.stage < schedule.num_stages:
                cause = "there is no such stage"
            elif not 0 <= action.microbatch < schedule.num_microbatches:
                cause = "there is no such microbatch"
            elif mode is Mode.INFER and action.kind is not _FORWARD:
                cause = "an inference runs backward"
            elif action in places:
                cause = "the action is scheduled twice"
            elif home != rank:
                cause = f"stage {action.stage} already runs on rank {home}"
            elif action.microbatch <= before:
                cause = f"it comes after microbatch {before}; microbatches ascend"
            if cause:
                here = f"action {action} of rank {rank} in schedule {schedule.name}"
                raise VerificationError(cause, where=here)
            places[action] = rank, position
            latest[action.kind, action.stage] = action.microbatch
    return places


def _verify_complete(schedule: Schedule, mode: Mode, places: dict[Action, tuple[int, int]]) -> None:
    for stage in range(schedule.num_stages):
        for microbatch in range(schedule.num_microbatches):
            cause = _incomplete(mode, places, stage, microbatch)
            if cause:
                raise VerificationError(cause, where=f"schedule {schedule.name}")


def _incomplete(
    mode: Mode, places: dict[Action, tuple[int, int]], stage: int, microbatch: int
) -> str:
    """What is missing or out of order for one stage and microbatch, or an empty string."""
    order = [Action(_FORWARD, stage, microbatch)]
    if mode is Mode.TRAIN:
        whole = Action(_BACKWARD, stage, microbatch)
        halves = [Action(kind, stage, microbatch) for kind in (_INPUT, _WEIGHT)]
        if whole not in places:
            order += halves
        elif any(half in places for half in halves):
            return f"{whole} is scheduled beside one of its halves"
        else:
            order.append(whole)
    for action in order:
        if action not in places:
            other = f" (or {_BACKWARD.value}{stage}.{microbatch})" if action.kind is _INPUT else ""
            return f"{action}{other} is not scheduled"
    for first, second in zip(order, order[1:], strict=False):
        if places[second] < places[first]:
            return f"{second} comes before {first}"
    return ""


def _verify_progress(
    schedule: Schedule,
    places: dict[Action, tuple[int, int]],
    edges: tuple[tuple[int, int], ...],
) -> None:
    before: dict[int, list[int]] = {}
    after: dict[int, list[int]] = {}
    for source, target in edges:
        before.setdefault(target, []).append(source)
        after.setdefault(source, []).append(target)

    def needs(action: Action) -> Iterator[Action]:
        if action.kind is _FORWARD:
            for stage in before.get(action.stage, ()):
                yield Action(_FORWARD, stage, action.microbatch)
        elif action.kind is not _WEIGHT:
            for stage in after.get(action.stage, ()):
                whole = Action(_BACKWARD, stage, action.microbatch)
                yield whole if whole in places else Action(_INPUT, stage, action.microbatch)

    def waits(action: Action) -> Iterator[Wait]:
        for needed in needs(action):
            rank, position = places[needed]
            yield Wait(rank, position + 1, needed)

    cycle = find_deadlock([[tuple(waits(action)) for action in row] for row in schedule.ranks])
    if cycle:
        lines = [
            f"rank {entry.rank} at {schedule.ranks[entry.rank][entry.position]} waits for "
            f"{entry.wait.reason} of rank {entry.wait.rank}"
            for entry in cycle
        ]
        raise VerificationError(
            "the schedule deadlocks: " + "; ".join(lines), where=f"schedule {schedule.name}"
        )
