"""Variants: the model captured for each kind of call, with programs for it.

A kind of call is a mode, the train/eval flags of modules, what is frozen, and the shapes of the
inputs. The planned kind comes with the plan; another is captured when it is first needed, and the
plan's stages are carried over to it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor, nn

from ..passes.place import stream
from ..passes.schedule import build_schedule
from ..passes.transfer import carried_over
from .batch import Call, batch_size, signature_of, take_rows
from .capture import Captured, capture
from .ir.counts import divisors
from .ir.errors import CaptureError
from .ir.fingerprint import fingerprint
from .ir.graph import Mode
from .ir.plan import Objective, Plan
from .ir.program import Program
from .ir.schedule import Schedule
from .placement import Needs
from .planned import PlannedModel, build_programs

__all__ = ["Variant", "Variants"]


@dataclass(frozen=True, slots=True)
class Variant:
    """The model captured for one kind of call, with programs for it."""

    key: str
    captured: Captured
    plan: Plan
    programs: tuple[Program, ...]
    needs: Needs


class Variants:
    """Makes the variants of a planned model.

    Args:
        loss_fn, clip_grad_norm: of training; see `auto_partition`.
    """

    def __init__(
        self,
        planned: PlannedModel,
        *,
        loss_fn: Callable[..., Tensor] | None,
        clip_grad_norm: float | None,
    ) -> None:
        self._planned = planned
        self._loss_fn = loss_fn
        self._clip_grad_norm = clip_grad_norm
        self._flags = _Flags(planned.model)
        self._planned_flags = self._flags.text()

    def key(self, mode: Mode, call: Call) -> str:
        """Equal for calls of one kind."""
        flags = self._flags.text() if mode is Mode.TRAIN else "eval"
        return f"{mode.value} {flags} {signature_of(call)}"

    def make(self, mode: Mode, call: Call) -> Variant:
        """The variant for a kind of call.

        Raises:
            CaptureError: the model cannot be captured for it.
        """
        key = self.key(mode, call)
        return self._first(mode, call, key) or self._new(mode, call, key)

    def _first(self, mode: Mode, call: Call, key: str) -> Variant | None:
        """The planned variant, if it is for this kind of call."""
        planned = self._planned
        plan = planned.plan
        if mode is not plan.mode or batch_size(*call) != plan.batch_size:
            return None
        if mode is Mode.TRAIN and self._flags.text() != self._planned_flags:
            return None
        micro = take_rows(call, plan.batch_size // plan.num_microbatches)
        if signature_of(micro) != planned.call_signature:
            return None
        needs = Needs.of(planned.programs)
        return Variant(key, planned.captured, plan, planned.programs, needs)

    def _new(self, mode: Mode, call: Call, key: str) -> Variant:
        """Capture for a new kind of call and carry the plan's stages over."""
        planned, first = self._planned, self._planned.plan
        rows = batch_size(*call)
        count = self._microbatch_count(rows)
        args, kwargs = take_rows(call, rows // count)
        loss_fn = self._loss_fn if mode is Mode.TRAIN else None
        try:
            captured = capture(planned.model, args, kwargs, mode=mode, loss_fn=loss_fn, check=False)
        except CaptureError as error:
            raise self._at_another_size(error, rows, count) from error
        plan = replace(
            carried_over(first, planned.captured.graph, captured.graph),
            recomputed=(),
            fingerprint=fingerprint(captured.graph, first.fingerprint.name),
            mode=mode,
            batch_size=rows,
            num_microbatches=count,
            schedule=None,
            prediction=None,
            certificate=None,
        )
        plan = replace(plan, schedule=_schedule(plan, captured, first))
        clip = self._clip_grad_norm if mode is Mode.TRAIN else None
        programs = build_programs(captured, plan, clip, len(planned.programs))
        return Variant(key, captured, plan, programs, Needs.of(programs))

    def _at_another_size(self, error: CaptureError, rows: int, count: int) -> CaptureError:
        """The same error, saying so if the microbatches are smaller than the planned ones."""
        planned = self._planned.plan.batch_size // self._planned.plan.num_microbatches
        if rows // count == planned:
            return error
        return CaptureError(
            f"{error.cause}; this call has {rows} rows, run as {count} microbatches of "
            f"{rows // count} where the plan has {planned} rows each",
            where=error.where,
            ways_out=(f"pass batches of a multiple of {planned} rows", *error.ways_out),
        )

    def _microbatch_count(self, rows: int) -> int:
        """Fewest equal microbatches that are no larger than the planned ones."""
        plan = self._planned.plan
        largest = max(1, plan.batch_size // plan.num_microbatches)
        return min(count for count in divisors(rows) if rows // count <= largest)


def _schedule(plan: Plan, captured: Captured, first: Plan) -> Schedule:
    """A schedule like that of `first`, for the stages and microbatches of `plan`."""
    if plan.objective is not Objective.STEP:
        return stream(plan, captured.graph)
    return build_schedule(
        first.schedule.name if plan.mode is Mode.TRAIN and first.schedule else "forward",
        num_stages=len(plan.stages),
        num_microbatches=plan.num_microbatches,
        devices=tuple(stage.device for stage in plan.stages),
    )


class _Flags:
    """What of a model decides what is captured for training: modes, and what is frozen."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = tuple(model.modules())
        self._parameters = tuple(model.parameters())

    def text(self) -> str:
        """Short, equal where the flags are; quick, as each step asks for it."""
        flags = [module.training for module in self._modules]
        flags += [parameter.requires_grad for parameter in self._parameters]
        return hashlib.sha256(bytes(flags)).hexdigest()[:12]
