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
            here = f"action {action} of rank {rank} in schedule {schedule.name}"
            check(action.stage in range(schedule.num_stages), "there is no such stage", here)
            check(
                action.microbatch in range(schedule.num_microbatches),
                "there is no such microbatch",
                here,
            )
            check(mode is Mode.TRAIN or action.kind is _FORWARD, "an inference runs backward", here)
            check(action not in places, "the action is scheduled twice", here)
            places[action] = rank, position
            home = stage_rank.setdefault(action.stage, rank)
            check(home == rank, f"stage {action.stage} already runs on rank {home}", here)
            before = latest.get((action.kind, action.stage), -1)
            check(
                action.microbatch > before,
                f"it comes after microbatch {before}; microbatches ascend",
                here,
            )
            latest[action.kind, action.stage] = action.microbatch
    return places


def _verify_complete(schedule: Schedule, mode: Mode, places: dict[Action, tuple[int, int]]) -> None:
    here = f"schedule {schedule.name}"
    for stage in range(schedule.num_stages):
        for microbatch in range(schedule.num_microbatches):
            found = {kind: Action(kind, stage, microbatch) for kind in ActionKind}
            order = [_FORWARD]
            if mode is Mode.TRAIN:
                whole = found[_BACKWARD] in places
                split = found[_INPUT] in places or found[_WEIGHT] in places
                check(
                    not (whole and split),
                    f"{found[_BACKWARD]} is scheduled beside one of its halves",
                    here,
                )
                order += [_BACKWARD] if whole else [_INPUT, _WEIGHT]
            for kind in order:
                missing = found[kind]
                names = f"{missing} (or {found[_BACKWARD]})" if kind is _INPUT else str(missing)
                check(missing in places, f"{names} is not scheduled", here)
            for first, second in zip(order, order[1:], strict=False):
                check(
                    places[found[first]] < places[found[second]],
                    f"{found[second]} comes before {found[first]}",
                    here,
                )


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
            yield Wait(rank, position + 1, f"{needed} of rank {rank}")

    cycle = find_deadlock([[tuple(waits(action)) for action in row] for row in schedule.ranks])
    if cycle:
        lines = [
            f"rank {entry.rank} at {schedule.ranks[entry.rank][entry.position]} waits for "
            f"{entry.wait.reason}"
            for entry in cycle
        ]
        raise VerificationError(
            "the schedule deadlocks: " + "; ".join(lines), where=f"schedule {schedule.name}"
        )
