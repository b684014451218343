"""Gradients and weights after three optimizer steps equal those of the unpartitioned model.

Two plans per model here; all stage counts, schedules and precisions: `benchmarks/exactness.py`
(`make test-all`).
"""

from __future__ import annotations

import pytest

from cutset.compiler.ir.errors import CaptureError
from cutset.runtime.inprocess import InProcessSession
from tests.exactness.harness import Subject, adamw64, sgd32
from tests.models.exact import EXACT_MODELS, gradient_hook


@pytest.mark.parametrize("name", EXACT_MODELS)
def test_three_stages_in_double_precision(name: str) -> None:
    subject = Subject(EXACT_MODELS[name], adamw64)
    errors = subject.errors(3, "1f1b", InProcessSession(3))
    assert all(error.value <= adamw64.tolerance for error in errors.values()), errors
    assert subject.reference.gradients


@pytest.mark.parametrize(
    "name",
    ["gpt2", pytest.param("t5", marks=pytest.mark.slow), "resnet", "no_grad", "autocast"],
)
def test_two_stages_in_single_precision(name: str) -> None:
    errors = Subject(EXACT_MODELS[name], sgd32).errors(2, "gpipe", InProcessSession(2))
    assert all(error.value <= sgd32.tolerance for error in errors.values()), errors


def test_clipping_by_the_global_norm() -> None:
    subject = Subject(EXACT_MODELS["gpt2"], adamw64, clip_grad_norm=0.1)
    errors = subject.errors(3, "1f1b", InProcessSession(3))
    assert all(error.value <= adamw64.tolerance for error in errors.values()), errors


def test_gradient_hooks_are_refused_by_name() -> None:
    with pytest.raises(CaptureError, match="hook"):
        Subject(gradient_hook, adamw64)


def test_the_same_seed_trains_the_same_weights_under_any_plan() -> None:
    subject = Subject(EXACT_MODELS["bert"], adamw64)
    weights = [
        subject.run(stages, schedule, InProcessSession(stages)).run.weights
        for stages, schedule in ((1, "1f1b"), (2, "gpipe"), (4, "1f1b"))
    ]
    for other in weights[1:]:
        for name, tensor in weights[0].items():
            assert (tensor - other[name]).abs().max() <= 1e-13, name
