"""A captured model with a plan: what planning hands to running."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..runtime.launcher import under_torchrun
from .capture import Captured
from .codegen.programs import generate_programs
from .ir.fingerprint import plan_hash
from .ir.plan import Plan
from .ir.program import Program
from .ir.verify import verify_programs

__all__ = ["PlannedModel", "build_programs"]


@dataclass(frozen=True, slots=True)
class PlannedModel:
    """A captured model with its verified plan and programs, not yet running.

    `call_signature` and `training` say for which microbatch call, and with which train/eval flag,
    the model was captured.
    """

    model: nn.Module
    captured: Captured
    plan: Plan
    programs: tuple[Program, ...]
    call_signature: str
    training: bool


def build_programs(
    captured: Captured, plan: Plan, clip_grad_norm: float | None = None
) -> tuple[Program, ...]:
    """Programs of a plan, proved safe. Raises VerificationError."""
    programs = generate_programs(
        captured.graph,
        plan,
        plan_hash=plan_hash(plan),
        clip_grad_norm=clip_grad_norm,
        num_ranks=len(plan.cluster.devices) if under_torchrun() else None,
    )
    verify_programs(programs)
    return programs
