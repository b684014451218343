"""What the next best layouts of a block would cost a step, and what keeps faster ones away.

All blocks that take the decision together change (every second layer, mostly), each in its stage;
the step is that of the planner's objective with the stages' new seconds.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from ..passes.layouts.runner_up import Change, RunnerUp, planned_layouts
from ..passes.partition.problem import in_flight_microbatches
from .ir.graph import Graph
from .ir.plan import TENSOR, Plan
from .words import bytes_text, plural, seconds_text

__all__ = ["BlockRunnerUp", "RunnerUps", "runner_up_text"]

_SAME = 1e-4  # of a step: less is no difference
_NAMED = 2  # changes that are shown


@dataclass(frozen=True, slots=True)
class BlockRunnerUp:
    """The next best layouts of a block.

    Args:
        changes: what lies otherwise, parameters first.
        num_blocks: that change together.
        step_seconds: of a step, more than the plan takes (less, if it is faster and does not fit).
        device_bytes: of the device that needs most, more than the plan needs there.
        constraint: what keeps the plan from it: `time`, the memory of a stage, or nothing, as the
            search of meshes takes microbatches of like size for one.
    """

    changes: tuple[Change, ...]
    num_blocks: int
    step_seconds: float
    device_bytes: int
    constraint: str


class RunnerUps:
    """Runner-ups of the blocks of one plan, over its tensor axis."""

    def __init__(self, plan: Plan, graph: Graph) -> None:
        self.plan = plan
        splits = plan.mesh.axis(TENSOR).size > 1 and plan.stage_mesh.axes[-1].name == TENSOR
        known = plan.prediction is not None and plan.schedule is not None
        self._layouts = (
            planned_layouts(plan, graph, plan.stages[0].devices) if splits and known else None
        )
        self._stage_of = {node: s.index for s in reversed(plan.stages) for node in s.nodes}

    def of(self, nodes: tuple[int, ...]) -> BlockRunnerUp | None:
        """Of the block made of `nodes`; None if nothing else can be chosen."""
        found = self._layouts.runner_up(nodes) if self._layouts is not None else None
        if found is None:
            return None
        blocks = Counter(self._stage_of[node] for node in found.nodes)
        shares = {stage: count / len(found.nodes) for stage, count in blocks.items()}
        seconds = self._step_seconds(found, shares)
        needs = {stage: self._bytes(found, stage, share) for stage, share in shares.items()}
        return BlockRunnerUp(
            changes=found.changes,
            num_blocks=len(found.nodes),
            step_seconds=seconds,
            device_bytes=max(needs.values()),
            constraint=self._constraint(seconds, needs),
        )

    def _step_seconds(self, found: RunnerUp, shares: dict[int, float]) -> float:
        """Fill and drain, the slowest stage for every other microbatch, and what is once a step."""
        prediction = self.plan.prediction
        assert prediction is not None
        before = [
            forward + backward
            for forward, backward in zip(
                prediction.stage_forward_seconds, prediction.stage_backward_seconds, strict=True
            )
        ]
        after = [time + found.seconds * shares.get(stage, 0.0) for stage, time in enumerate(before)]
        once = found.step_seconds * max(shares.values())
        repeats = self.plan.num_microbatches - 1
        return sum(after) - sum(before) + repeats * (max(after) - max(before)) + once

    def _bytes(self, found: RunnerUp, stage: int, share: float) -> int:
        assert self.plan.schedule is not None
        in_flight = in_flight_microbatches(
            self.plan.schedule.name, self.plan.num_microbatches, len(self.plan.stages), stage
        )
        return round(share * (found.held_bytes + in_flight * found.saved_bytes))

    def _constraint(self, seconds: float, needs: dict[int, int]) -> str:
        prediction = self.plan.prediction
        assert prediction is not None
        if seconds >= -_SAME * prediction.step_seconds:
            return "time"
        used = {entry.device: entry.total_bytes for entry in prediction.memory}
        for stage, need in sorted(needs.items(), key=lambda item: -item[1]):
            device = self.plan.stages[stage].device
            limit = self.plan.cluster.type_of(device).memory_bytes
            if used[device] + need > limit:
                return f"memory of stage {stage}"
        return "nothing, layouts are chosen for microbatches of about this size"


def runner_up_text(entry: BlockRunnerUp, step_seconds: float) -> str:
    """The runner-up in a sentence; `step_seconds` are the plan's."""
    named = [
        f"{change.name} {change.instead} instead of {change.chosen}"
        for change in entry.changes[:_NAMED]
        if change.is_parameter or not entry.changes[0].is_parameter
    ]
    rest = sum(change.is_parameter for change in entry.changes) - len(named)
    if entry.changes[0].is_parameter and rest > 0:
        named.append(f"{rest} more")
    ratio = entry.step_seconds / step_seconds if step_seconds else 0.0
    seconds = seconds_text(abs(entry.step_seconds))
    cost = f"{'+' if entry.step_seconds >= 0 else '-'}{seconds} a step ({ratio:+.1%})"
    if abs(entry.step_seconds) <= _SAME * step_seconds:
        cost = "as fast"
    size = ""
    if entry.device_bytes:
        more = "more" if entry.device_bytes > 0 else "less"
        size = f", {bytes_text(abs(entry.device_bytes))} {more} a device"
    where = f" in {plural(entry.num_blocks, 'block')}" if entry.num_blocks > 1 else ""
    return f"{', '.join(named)}{where}: {cost}{size}; binds: {entry.constraint}"
