"""Decides the order of each rank's actions: GPipe, 1F1B, forward-only.

From the stages' devices and the number of microbatches to a `Schedule`. GPipe (Huang et al., 2019)
runs all forwards, then all backwards. 1F1B (PipeDream-Flush, Narayanan et al., 2021) lets stage s
of S run min(m, S - s - 1) forwards ahead and then alternates, so that at most S - s microbatches
are in flight. A backward is split into input gradients (I), whose results the stage before waits
for, and weight gradients (W) right after them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..compiler.ir.errors import UsageError
from ..compiler.ir.plan import Plan
from ..compiler.ir.schedule import Action, ActionKind, Schedule
from .context import Context
from .partition.prepare import schedule_name

__all__ = ["BuildSchedule", "build_schedule"]

SCHEDULES = ("1f1b", "gpipe", "forward")


def build_schedule(
    name: str,
    *,
    num_stages: int,
    num_microbatches: int,
    devices: Sequence[int],
    split_backward: bool = True,
) -> Schedule:
    """The schedule called `name`, one stage a device.

    Args:
        name: `1f1b`, `gpipe` or `forward` (no backward).
        devices: of every stage; ranks are numbered by device, those without a stage are idle.
        split_backward: input and weight gradients as two actions instead of one.

    Raises:
        UsageError: no such schedule.
    """
    if name not in SCHEDULES:
        raise UsageError(
            f"no schedule is called {name!r}", ways_out=(f"known: {', '.join(SCHEDULES)}",)
        )
    if len(set(devices)) != num_stages:
        raise UsageError(
            f"{num_stages} stages on devices {tuple(devices)}: {name} needs one for each",
            ways_out=("give each stage a device of its own",),
        )
    ranks: list[tuple[Action, ...]] = [()] * (max(devices) + 1)
    for stage, device in enumerate(devices):
        ahead = {"1f1b": num_stages - stage - 1, "gpipe": num_microbatches}.get(name, 0)
        order = _stage_actions(stage, num_microbatches, min(ahead, num_microbatches))
        ranks[device] = _lowered(order, name, split_backward)
    return Schedule(name, num_stages, num_microbatches, tuple(ranks))


def _stage_actions(stage: int, num_microbatches: int, ahead: int) -> list[Action]:
    """`ahead` forwards, then forward and backward in turn, then the backwards that are left."""
    order = [Action(ActionKind.FORWARD, stage, index) for index in range(ahead)]
    for index in range(num_microbatches):
        if index + ahead < num_microbatches:
            order.append(Action(ActionKind.FORWARD, stage, index + ahead))
        order.append(Action(ActionKind.BACKWARD, stage, index))
    return order


def _lowered(order: list[Action], name: str, split_backward: bool) -> tuple[Action, ...]:
    """Drop backwards of a forward-only schedule, split those of the others if wanted."""
    actions: list[Action] = []
    for action in order:
        if action.kind is not ActionKind.BACKWARD:
            actions.append(action)
        elif name != "forward" and split_backward:
            halves = (ActionKind.BACKWARD_INPUT, ActionKind.BACKWARD_WEIGHT)
            actions += [Action(kind, action.stage, action.microbatch) for kind in halves]
        elif name != "forward":
            actions.append(action)
    return tuple(actions)


@dataclass(frozen=True, slots=True)
class BuildSchedule:
    """Pass: fills `plan.schedule`."""

    name: str = "schedule"

    def run(self, plan: Plan, context: Context) -> Plan:
        schedule = build_schedule(
            schedule_name(plan, context),
            num_stages=len(plan.stages),
            num_microbatches=plan.num_microbatches,
            devices=[stage.device for stage in plan.stages],
        )
        return replace(plan, schedule=schedule)
