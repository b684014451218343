"""Memory of the actions of one stage, one microbatch: what lives while F, I and W run, and between.

Counted by liveness of the stage's steps (`backward.py`, `liveness.py`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..compiler.ir.graph import Mode
from .backward import StageSteps
from .liveness import live_bytes
from .memory_tables import MemoryModel

__all__ = ["ActionMemory", "PartMemory", "action_memory", "memory_of_steps"]


@dataclass(frozen=True, slots=True)
class PartMemory:
    """A part of the weight gradients: its peak above what was kept before it, and what is kept
    after it, in bytes."""

    peak_bytes: float
    left_bytes: float


@dataclass(frozen=True, slots=True)
class ActionMemory:
    """Memory of one stage's actions on one microbatch, in bytes.

    Args:
        received_bytes: boundary values, which are among the forward's.
        saved_bytes: kept from the end of the forward to the backward.
        left_bytes: kept between input gradients and weight gradients.
        forward_bytes: peak of the forward, what it saves included.
        backward_input_bytes: peak of the input gradients above `saved_bytes`.
        weight_parts: the weight gradients, which may be computed in parts.
    """

    received_bytes: float
    saved_bytes: float
    left_bytes: float
    forward_bytes: float
    backward_input_bytes: float
    weight_parts: tuple[PartMemory, ...]

    @property
    def part_bytes(self) -> tuple[float, ...]:
        """The most that is live in each part of the weight gradients."""
        before = (self.left_bytes, *(part.left_bytes for part in self.weight_parts))
        pairs = zip(before, self.weight_parts, strict=False)
        return tuple(kept + part.peak_bytes for kept, part in pairs)

    @property
    def backward_weight_bytes(self) -> float:
        """Peak of the weight gradients above `left_bytes`."""
        return max(self.part_bytes, default=0.0) - self.left_bytes

    @property
    def peak_bytes(self) -> float:
        """Most that is live, what is saved of this microbatch included."""
        return max(
            self.forward_bytes,
            self.saved_bytes + self.backward_input_bytes,
            self.left_bytes + self.backward_weight_bytes,
        )

    @property
    def backward_bytes(self) -> float:
        """Peak of the whole backward above `saved_bytes`."""
        later = self.left_bytes + self.backward_weight_bytes - self.saved_bytes
        return max(self.backward_input_bytes, later)


def action_memory(
    model: MemoryModel,
    nodes: Iterable[int] | None,
    recomputed: Collection[int] = (),
    kept: Mapping[int, float] | None = None,
    parts: Sequence[Collection[int]] = (),
) -> ActionMemory:
    """Memory of each action of the stage made of `nodes` (None: all nodes of the graph).

    Args:
        recomputed: nodes whose results backward computes again.
        kept: parameters of which backward sums the gradient, and bytes of the buffers for that.
        parts: parameters whose gradients each part of the weight gradients completes.
    """
    chosen = range(len(model.graph.nodes)) if nodes is None else nodes
    steps = model.steps(chosen, recomputed=recomputed, kept=kept, parts=parts)
    return memory_of_steps(steps, model.graph.mode is Mode.TRAIN)


def memory_of_steps(steps: StageSteps, train: bool) -> ActionMemory:
    """As `action_memory`, of the stage's steps."""
    received = set(steps.received)
    keep = steps.outputs | received | (set(steps.saved) if train else set())
    forward = live_bytes(steps.forward, steps.received, keep)
    if not train:
        return ActionMemory(sum(steps.received.values()), 0.0, 0.0, forward.peak_bytes, 0.0, ())
    saved = sum(steps.saved.values())
    start = {**steps.saved, **steps.arriving}
    later = {storage for step in steps.backward_weight for storage in step.reads}
    keep_b = (later & {*start, *steps.passed}) | set(steps.arriving) | set(steps.returned)
    first = live_bytes(steps.backward_input, start, keep_b)
    left = {storage: size for storage, size in first.end.items() if storage in later}
    return ActionMemory(
        received_bytes=sum(steps.received.values()),
        saved_bytes=saved,
        left_bytes=sum(left.values()),
        forward_bytes=forward.peak_bytes,
        backward_input_bytes=first.peak_bytes - saved,
        weight_parts=tuple(_part_memory(steps, left)),
    )


def _part_memory(steps: StageSteps, left: Mapping[int, float]) -> Iterator[PartMemory]:
    """`left`: what B leaves."""
    live = dict(left)
    for number, part in enumerate(steps.weight_parts):
        rest = steps.weight_parts[number + 1 :]
        later = {storage for steps in rest for step in steps for storage in step.reads}
        found = live_bytes(part, live, later)
        kept = {storage: size for storage, size in found.end.items() if storage in later}
        yield PartMemory(found.peak_bytes - sum(live.values()), sum(kept.values()))
        live = kept
