"""Translation validation of plans that split tensors: right ones pass, wrong ones are caught."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cutset.compiler import validate
from cutset.compiler.api import plan_model
from cutset.compiler.ir.errors import VerificationError
from cutset.compiler.ir.mesh import Mesh
from cutset.compiler.ir.program import AllReduce, Program
from cutset.compiler.validate import verify_numerically

from .partitioned import batch, chain, plan_over


@pytest.mark.parametrize(
    ("mesh", "seed"), [("data=2,tensor=2", None), ("pipeline=2,tensor=2", 1), ("data=2", 2)]
)
def test_right_plans_pass(mesh: str, seed: int | None) -> None:
    inputs = tuple(item.float() for item in batch())
    planned = plan_over(chain(0.3).float(), Mesh.parse(mesh), *inputs, seed=seed)
    errors = verify_numerically(planned)
    assert set(errors) == {"loss", "outputs", "gradients", "weights"}
    assert max(errors.values()) <= 1e-12


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_what_the_planner_chooses_passes(zero: int) -> None:
    """Layouts, copies and updates of a plan that nobody wrote by hand."""
    planned = plan_model(
        chain(0.3),
        4,
        example_inputs=batch(8),
        loss_fn=F.mse_loss,
        mesh="data=2,tensor=2",
        zero=zero,
        num_microbatches=2,
        check=False,
    )
    assert planned.plan.stage_mesh.size == 4
    assert max(verify_numerically(planned).values()) <= 1e-12


class Rounding(nn.Module):
    """A norm in float32 whatever its input is in, behind a sum over ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 64), nn.Linear(64, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.last(torch.relu(self.first(x))).float()
        return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)).double()


def test_a_model_that_rounds_inside_is_allowed_to() -> None:
    torch.manual_seed(0)
    planned = plan_over(Rounding().double(), Mesh.parse("tensor=2"), *batch())
    assert max(verify_numerically(planned).values()) <= 1e-4


def test_a_gradient_that_is_not_summed_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers alone find it, were the verifier of programs not there."""

    def broken(*args: Any, **options: Any) -> tuple[Program, ...]:
        programs = right(*args, **options)
        return tuple(
            replace(
                program,
                instructions=tuple(
                    item for item in program.instructions if not isinstance(item, AllReduce)
                ),
            )
            for program in programs
        )

    right = validate.build_programs
    monkeypatch.setattr(validate, "build_programs", broken)
    planned = plan_over(chain(), Mesh.parse("data=2"), *batch())
    with pytest.raises(VerificationError, match="partitioned gradients differ"):
        verify_numerically(planned)
