"""A captured model with a plan: what planning hands to running."""

from __future__ import annotations

from dataclasses import dataclass, fields
from os import PathLike
from pathlib import Path

from torch import nn

from ..runtime.launcher import under_torchrun
from .batch import Call
from .capture import Captured
from .capture.signature import LossFunction
from .codegen.programs import generate_programs
from .export import to_onnx
from .ir.fingerprint import plan_hash
from .ir.graph import Graph
from .ir.plan import Plan
from .ir.program import Program
from .ir.verify import verify_programs
from .plan_json import save_plan

__all__ = ["ModelPlan", "PlannedModel", "build_programs"]


class ModelPlan(Plan):
    """A plan together with the graph that it is for, so that it can be exported."""

    __slots__ = ("_graph",)
    _graph: Graph

    @staticmethod
    def of(plan: Plan, graph: Graph) -> ModelPlan:
        """`plan`, bound to `graph`."""
        bound = ModelPlan(**{field.name: getattr(plan, field.name) for field in fields(Plan)})
        object.__setattr__(bound, "_graph", graph)
        return bound

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and all(
            getattr(self, field.name) == getattr(other, field.name) for field in fields(Plan)
        )

    __hash__ = Plan.__hash__

    def save(self, path: str | PathLike[str]) -> None:
        """Write `plan.json` (see `plan_json.save_plan`)."""
        save_plan(self, path)

    def to_onnx(self, path: str | PathLike[str]) -> None:
        """Write the annotated ONNX view of the whole model (see `export.to_onnx`)."""
        to_onnx(self, self._graph, Path(path), plan_hash=plan_hash(self))


@dataclass(frozen=True, slots=True)
class PlannedModel:
    """A captured model with its verified plan and programs, not yet running.

    Args:
        call: the example call, whole batch.
        loss_fn: the loss function that it was captured with.
        call_signature: for which microbatch call it was captured (see `batch.signature_of`).
        training: with which train/eval flag.
    """

    model: nn.Module
    captured: Captured
    plan: Plan
    programs: tuple[Program, ...]
    call: Call
    loss_fn: LossFunction | None
    call_signature: str
    training: bool


def build_programs(
    captured: Captured,
    plan: Plan,
    clip_grad_norm: float | None = None,
    num_ranks: int | None = None,
) -> tuple[Program, ...]:
    """Programs of a plan, proved safe: one for each of `num_ranks` ranks.

    By default there are as many as this job has under torchrun, else as many as the plan uses.

    Raises:
        VerificationError: a program breaks a rule.
    """
    if num_ranks is None and under_torchrun():
        num_ranks = len(plan.cluster.devices)
    programs = generate_programs(
        captured.graph,
        plan,
        plan_hash=plan_hash(plan),
        clip_grad_norm=clip_grad_norm,
        num_ranks=num_ranks,
    )
    verify_programs(programs)
    return programs
