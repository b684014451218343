"""A model whose tensors are split over ranks, as the user drives it: every call and all state are
those of the plain model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cutset.compiler.ir.mesh import Mesh
from cutset.compiler.parallel import Parallel, RunOptions
from cutset.runtime.inprocess import InProcessSession

from .partitioned import Plain, assert_same, plan_over, train_both

HEADS = 2
FEATURES = 8


class Net(nn.Module):
    """Attention, BatchNorm, dropout, a tied weight and an output that is not batched."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(FEATURES, 3 * FEATURES)
        self.outer = nn.Linear(FEATURES, FEATURES)
        self.norm = nn.BatchNorm1d(FEATURES)
        self.drop = nn.Dropout(0.3)
        self.last = nn.Linear(FEATURES, FEATURES, bias=False)
        self.last.weight = self.outer.weight

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        parts = self.inner(x).unflatten(-1, (HEADS, -1)).transpose(1, 2).chunk(3, dim=-1)
        mixed = F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2)
        hidden = x + self.drop(self.outer(mixed))
        normed = self.norm(hidden.transpose(1, 2)).transpose(1, 2)
        return {"out": self.last(torch.relu(normed)), "scale": self.outer.weight.abs().mean()}


def loss_fn(outputs: dict[str, Tensor], target: Tensor) -> Tensor:
    return F.mse_loss(outputs["out"], target) + outputs["scale"]


def net() -> Net:
    torch.manual_seed(5)
    return Net().double().train()


def batch(rows: int = 4, length: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(seed)
    shape = (rows, length, FEATURES)
    x, target = (torch.randn(shape, generator=source, dtype=torch.float64) for _ in range(2))
    return x, target


PLANS = [
    ("data=2,tensor=2", None),
    pytest.param("pipeline=2,tensor=2", 1, marks=pytest.mark.slow),
    pytest.param("data=2,pipeline=2", 2, marks=pytest.mark.slow),
    pytest.param("tensor=4", 3, marks=pytest.mark.slow),
    pytest.param("data=2,pipeline=2,tensor=2", 4, marks=pytest.mark.slow),
]


def sharded(mesh: str, seed: int | None, **options: Any) -> Parallel:
    axes = Mesh.parse(mesh)
    options.setdefault("optimizer", lambda parameters: torch.optim.AdamW(parameters, lr=1e-3))
    planned = plan_over(net(), axes, *batch(), loss_fn=loss_fn, seed=seed)
    run = RunOptions(loss_fn=loss_fn, keep_gradients=True, **options)
    return Parallel(planned, run, InProcessSession(axes.size))


def plain(optimizer: Callable[[Any], torch.optim.Optimizer] | None = None) -> Plain:
    return Plain(net(), optimizer, loss_fn=loss_fn)


def check_outputs(parallel: Parallel, model: nn.Module, x: Tensor) -> None:
    """The whole outputs, as the model makes them in eval mode."""
    was_training = model.training
    found = parallel(x)
    with torch.no_grad():
        expected = model.eval()(x)
    model.train(was_training)
    assert_same(found, expected)


@pytest.mark.parametrize(("mesh", "seed"), PLANS)
def test_every_call_is_that_of_the_model(mesh: str, seed: int | None) -> None:
    """Inference, smaller batches, other lengths, train and eval flags, one after the other."""
    parallel, other = sharded(mesh, seed), plain()
    train_both(parallel, other, [batch()])
    assert_same(parallel.gradients(), other.gradients())
    check_outputs(parallel, other.model, batch()[0])
    train_both(parallel, other, [batch(rows=2, seed=1)])
    other.rows = 1  # three rows are three microbatches of one
    train_both(parallel, other, [batch(rows=3, seed=2)])
    other.rows = 2
    train_both(parallel, other, [batch(length=5, seed=3)])
    check_outputs(parallel, other.model, batch(length=3)[0])
    check_outputs(parallel, other.model, batch(rows=1)[0])
    parallel.eval()
    other.model.eval()
    train_both(parallel, other, [batch(seed=4)])
    parallel.train()
    other.model.train()
    train_both(parallel, other, [batch(seed=5)])
    assert_same(parallel.gradients(), other.gradients())


@pytest.mark.parametrize(("mesh", "seed"), [("pipeline=2,tensor=2", 1)])
def test_state_moves_between_plans_and_the_plain_model(mesh: str, seed: int | None) -> None:
    first, other = sharded(mesh, seed), plain()
    train_both(first, other, [batch(), batch(seed=1)])
    check_optimizer_state(first, other)
    second = sharded("data=2", None)
    second.load_state_dict(other.model.state_dict())
    second.load_optimizer_state_dict(first.optimizer_state_dict())
    train_both(second, other, [batch(seed=2)])
    first.load_state_dict(second.state_dict())
    first.load_optimizer_state_dict(second.optimizer_state_dict())
    train_both(first, other, [batch(seed=3)])
    check_optimizer_state(first, other)
    check_outputs(first, other.model, batch()[0])


def check_optimizer_state(parallel: Parallel, other: Plain) -> None:
    """Whole states, by name, as the plain optimizer has them."""
    found = parallel.optimizer_state_dict()["state"]
    for name, parameter in other.model.named_parameters():
        for key, value in other.optimizer.state[parameter].items():
            torch.testing.assert_close(found[name][key], value, rtol=1e-12, atol=1e-12)


def test_values_that_a_partial_state_lacks_stay_as_trained() -> None:
    parallel = sharded("data=2,tensor=2", 4)
    parallel.train_step(*batch())
    state = parallel.state_dict()
    bias = {"inner.bias": state["inner.bias"] + 1.0}
    parallel.load_state_dict(bias, strict=False)
    assert_same(parallel.state_dict(), state | bias, 0.0)
