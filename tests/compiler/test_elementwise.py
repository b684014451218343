"""Optimizers of parameters that ranks hold in parts: elementwise ones are exact, others refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from cutset.compiler.elementwise import check_elementwise
from cutset.compiler.ir.errors import UsageError
from cutset.compiler.ir.mesh import Mesh
from cutset.compiler.parallel import Parallel, RunOptions
from cutset.compiler.planned import PlannedModel
from cutset.runtime.inprocess import InProcessSession

from .partitioned import Plain, assert_same, batch, chain, plan_over, train_both

ELEMENTWISE: dict[str, dict[str, Any]] = {
    "AdamW": {"weight_decay": 0.1},
    "Adam": {"amsgrad": True},
    "SGD": {"lr": 1e-2, "momentum": 0.9, "nesterov": True},
    "RMSprop": {"momentum": 0.5, "centered": True},
    "Adagrad": {"lr_decay": 0.1},
    "NAdam": {},
    "RAdam": {},
    "Adamax": {},
    "Adadelta": {},
    "ASGD": {"t0": 1.0},
    "Rprop": {},
}
OTHERS = ("Adafactor", "Muon")


class Normalized(torch.optim.Optimizer):
    """Steps of one length, whatever the gradient: by the norm of a whole parameter."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p -= group["lr"] * p.grad / p.grad.norm()


@pytest.fixture(scope="module")
def planned() -> PlannedModel:
    model = chain()
    for layer in model.layers[1:]:
        layer.bias.requires_grad_(False)
    return plan_over(model, Mesh.parse("tensor=2"), *batch())


def make(name: str, parameters: Any) -> torch.optim.Optimizer:
    options = ELEMENTWISE.get(name, {})
    return getattr(torch.optim, name)(parameters, **options)  # type: ignore[no-any-return]


def parallel(planned: PlannedModel, name: str) -> Parallel:
    options = RunOptions(loss_fn=F.mse_loss, optimizer=lambda p: make(name, p))
    return Parallel(planned, options, InProcessSession(2))


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise_optimizers_are_exact(planned: PlannedModel, name: str) -> None:
    assert any(shard.name.endswith("weight") for p in planned.programs for shard in p.shards)
    ours, theirs = parallel(planned, name), Plain(planned.model, lambda p: make(name, p))
    train_both(ours, theirs, [batch(seed=seed) for seed in range(3)])
    state = ours.optimizer_state_dict()["state"]
    for key, parameter in theirs.model.named_parameters():
        found = {k: v for k, v in state.get(key, {}).items() if isinstance(v, torch.Tensor)}
        expected = theirs.optimizer.state[parameter]
        assert_same(found, {k: expected[k] for k in found})


@pytest.mark.parametrize("name", OTHERS)
def test_others_are_refused_by_name(planned: PlannedModel, name: str) -> None:
    with pytest.raises(UsageError, match=f"{name} cannot train '") as caught:
        if name == "Muon":  # refuses biases itself
            check_elementwise(torch.optim.Muon([torch.nn.Parameter(torch.zeros(3, 4))]), "w")
        parallel(planned, name)
    assert "mesh='pipeline=N'" in str(caught.value)


def test_any_kernel_and_rates_in_tensors_are_fine() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(3, 4))]
    check_elementwise(torch.optim.AdamW(parameters, lr=torch.tensor(1e-2), fused=True), "w")
    check_elementwise(torch.optim.AdamW(parameters, capturable=True), "w")


def test_what_a_user_wrote_is_tried_too() -> None:
    with pytest.raises(UsageError, match="Normalized cannot train 'w'"):
        check_elementwise(Normalized([torch.nn.Parameter(torch.zeros(3, 4))]), "w")


def test_whole_parameters_take_any_optimizer() -> None:
    whole = plan_over(chain(), Mesh.parse("pipeline=2"), *batch())
    options = RunOptions(loss_fn=F.mse_loss, optimizer=torch.optim.Adafactor)
    ours = Parallel(whole, options, InProcessSession(2))
    train_both(ours, Plain(chain(), torch.optim.Adafactor), [batch()])
