"""A plan file applied to the model that it was made for."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from .console import Console

if TYPE_CHECKING:
    from ..api import PlannedModel
    from ..ir.plan import Plan

__all__ = ["planned_from"]


def planned_from(options: argparse.Namespace, plan: Plan, console: Console) -> PlannedModel:
    """Load `options.model`, capture it and generate the verified programs of `plan`.

    Raises:
        PlanFormatError: the plan is for another model.
        VerificationError: a program of the plan must not run.
    """
    from ..api import plan_model
    from .model_loader import for_inference, load_model

    console.progress(f"load {options.model}")
    loaded = load_model(options.model, seed=options.seed, dtype=options.dtype)
    if plan.mode.value == "infer":
        loaded = for_inference(loaded)
    return plan_model(
        loaded.model,
        plan.cluster,
        example_inputs=loaded.args,
        example_kwargs=loaded.kwargs,
        loss_fn=loaded.loss_fn,
        mode=plan.mode.value,
        plan=plan,
        progress=console.progress,
    )
