"""The reference trainer is plain PyTorch, and its error measure has the floor it claims."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cutset.compiler.ir.errors import CaptureError, UsageError
from cutset.compiler.reference import (
    ReferenceRun,
    relative_error,
    relative_errors,
    train_reference,
)


def _net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).double()


def _batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 3, (8,), generator=generator)


def _sgd(parameters: object) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)  # type: ignore[arg-type]


def test_it_is_gradient_accumulation_over_microbatches() -> None:
    model, (x, y) = _net(), _batch()
    before = {name: item.clone() for name, item in model.state_dict().items()}
    run = train_reference(
        model, (x, y), loss_fn=F.cross_entropy, optimizer=_sgd, num_microbatches=2, steps=2
    )
    assert all(torch.equal(item, before[name]) for name, item in model.state_dict().items())
    optimizer = _sgd(model.parameters())
    for step in range(2):
        optimizer.zero_grad()
        for part in (slice(0, 4), slice(4, 8)):
            (F.cross_entropy(model(x[part]), y[part]) / 2).backward()
        if step == 0:
            for name, parameter in model.named_parameters():
                assert torch.equal(run.gradients[name], parameter.grad)  # type: ignore[arg-type]
        optimizer.step()
    found = {**run.weights, **run.buffers}
    assert all(torch.equal(found[name], item) for name, item in model.state_dict().items())
    assert set(run.buffers) == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    assert len(run.losses) == 2


def test_outputs_are_those_of_eval_mode_joined_along_the_batch() -> None:
    model, (x, y) = _net(), _batch()
    run = train_reference(model, (x, y), loss_fn=F.cross_entropy, num_microbatches=4, steps=1)
    assert model.training
    torch.testing.assert_close(run.outputs["output"], model.eval()(x))


class _ReturnsLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 1)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = self.drop(self.linear(x))
        return {"loss": hidden.square().mean(), "hidden": hidden}


def test_the_same_seed_draws_the_same_dropout_and_another_seed_does_not() -> None:
    torch.manual_seed(0)
    model, x = _ReturnsLoss(), torch.randn(4, 6)
    first, again, other = (
        train_reference(model, (x,), num_microbatches=2, steps=3, seed=seed) for seed in (0, 0, 1)
    )
    assert first.losses == again.losses
    assert first.losses != other.losses
    assert set(first.outputs) == {"['loss']", "['hidden']"}


def test_a_batch_that_cannot_be_split_and_a_model_without_loss_are_refused() -> None:
    x, y = _batch()
    with pytest.raises(UsageError, match="8 rows cannot be split into 3"):
        train_reference(_net(), (x, y), loss_fn=F.cross_entropy, num_microbatches=3)
    with pytest.raises(CaptureError, match="in which there is no loss"):
        train_reference(_net(), (x,))


def test_the_error_of_a_small_tensor_is_relative_to_a_floor() -> None:
    reference = {"big": torch.tensor([100.0, -200.0]), "noise": torch.tensor([1e-9])}
    ours = {"big": torch.tensor([100.0, -200.2]), "noise": torch.tensor([-1e-9])}
    worst = relative_error(ours, reference)
    assert worst.tensor == "big"
    assert worst.value == pytest.approx(1e-3, rel=1e-4)
    assert relative_error({"noise": ours["noise"]}, {"noise": reference["noise"]}).value == 2.0


def test_nan_shape_and_absence_are_not_overlooked() -> None:
    reference = {"a": torch.ones(2), "b": torch.ones(2)}
    nan = {"a": torch.ones(2), "b": torch.tensor([1.0, math.nan])}
    assert relative_error(nan, reference).tensor == "b"
    assert relative_error(nan, reference).value == math.inf
    assert relative_error({"a": torch.ones(2), "b": torch.ones(3)}, reference).value == math.inf
    assert relative_error({"a": torch.ones(2)}, reference).value == 1.0
    assert relative_error(reference, reference).value == 0.0


def test_a_wrong_buffer_shows_among_the_weights() -> None:
    def run(mean: float) -> ReferenceRun:
        weights = {"weight": torch.full((2,), 1e6)}
        buffers = {"mean": torch.full((2,), mean)}
        return ReferenceRun((1.0,), {}, {}, weights, buffers, 0.1)

    errors = relative_errors(run(1.1), run(1.0))
    assert errors["weights"].tensor == "mean"
    assert errors["weights"].value == pytest.approx(0.1)
    assert errors["loss"].value == 0.0
