"""A partitioned model as the user drives it: optimizers, schedulers, modes, state."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from cutset.compiler.ir.errors import CaptureError, UsageError
from cutset.compiler.ir.text import parse_program
from cutset.runtime.inprocess import InProcessSession

from .partitioned import (
    WIDTH,
    Chain,
    Plain,
    assert_same,
    batch,
    chain,
    partition,
    partition_chain,
    train_both,
)

BATCHES = [batch(seed=seed) for seed in range(3)]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Adam", {"lr": 1e-2, "amsgrad": True}),
        ("AdamW", {"lr": 1e-2, "betas": (0.8, 0.9), "weight_decay": 0.1}),
        ("Adagrad", {"lr": 1e-2, "lr_decay": 0.1}),
        ("RMSprop", {"lr": 1e-2, "momentum": 0.5, "centered": True}),
        ("SGD", {"lr": 1e-2, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
        ("NAdam", {"lr": 1e-2}),
    ],
)
def test_optimizers_of_torch_are_exact(name: str, options: dict[str, Any]) -> None:
    def make(parameters: Any) -> torch.optim.Optimizer:
        return getattr(torch.optim, name)(parameters, **options)

    parallel = partition_chain(optimizer=make)
    train_both(parallel, Plain(chain(), make), BATCHES)


def _groups(model: Chain) -> Callable[[Any], torch.optim.Optimizer]:
    """Weights of the first layer by themselves, all biases, the rest."""

    def make(_: Any) -> torch.optim.Optimizer:
        first = model.layers[0].weight
        biases = [p for n, p in model.named_parameters() if n.endswith("bias")]
        rest = [p for p in model.parameters() if p is not first and p.ndim > 1]
        groups = [
            {"params": [first], "lr": 3e-2},
            {"params": biases, "weight_decay": 0.0},
            {"params": rest},
        ]
        return torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1)

    return make


def test_parameter_groups_of_a_closure_over_the_model() -> None:
    model = chain()
    parallel = partition(model, optimizer=_groups(model))
    plain = Plain(chain())
    plain.optimizer = _groups(plain.model)(None)
    train_both(parallel, plain, BATCHES)
    assert parallel.plan.stages


def test_named_parameters_for_an_optimizer() -> None:
    model = chain()
    parallel = partition(model, optimizer=lambda _: torch.optim.SGD(model.named_parameters(), 0.1))
    train_both(parallel, Plain(chain(), lambda p: torch.optim.SGD(p, 0.1)), BATCHES)


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "step": lambda o: lr_scheduler.StepLR(o, 1, gamma=0.5),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1.0 / (step + 1)),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=6),
    "warm-up, then cosine": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.LinearLR(o, 0.1, total_iters=2), lr_scheduler.CosineAnnealingLR(o, 4)],
        milestones=[2],
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_change_the_rate_on_the_ranks_and_do_not_warn(name: str) -> None:
    make = lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9)  # noqa: E731
    parallel, plain = partition_chain(optimizer=make), Plain(chain(), make)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours, theirs = SCHEDULERS[name](parallel.optimizer), SCHEDULERS[name](plain.optimizer)
        rates = []
        for _ in range(2):
            train_both(parallel, plain, BATCHES[:2])
            ours.step()
            theirs.step()
            rates.append(parallel.optimizer.param_groups[0]["lr"])
    assert rates[0] != rates[1]
    assert ours.get_last_lr() == theirs.get_last_lr()


def test_a_gradient_left_on_the_model_spoils_no_scheduler() -> None:
    model = chain()
    model.layers[0].weight.grad = torch.ones_like(model.layers[0].weight)
    before = model.layers[0].weight.detach().clone()
    parallel = partition(model, optimizer=lambda p: torch.optim.SGD(p, lr=1e-2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler = lr_scheduler.StepLR(parallel.optimizer, 1)
        parallel.train_step(*batch())
        scheduler.step()
    assert torch.equal(model.layers[0].weight, before), "the model itself is not trained"
    assert model.layers[0].weight.grad is not None


def test_an_optimizer_that_needs_a_closure_is_refused() -> None:
    with pytest.raises(UsageError, match="LBFGS"):
        partition_chain(optimizer=lambda p: torch.optim.LBFGS(p))


def test_planning_knows_the_state_of_an_optimizer_made_from_the_model_itself() -> None:
    model = chain()
    parallel = partition(model, optimizer=_groups(model))
    assert parallel.plan.optimizer.state_bytes_per_parameter_byte == 2.0


def test_gradients_are_clipped_by_their_global_norm() -> None:
    limit = 0.05
    make = lambda p: torch.optim.SGD(p, lr=1.0)  # noqa: E731
    parallel = partition(chain(), optimizer=make, clip_grad_norm=limit, keep_gradients=True)
    plain = Plain(chain(), make, clip=limit)
    train_both(parallel, plain, BATCHES)
    assert plain.norm > limit
    norm = sum(float(g.square().sum()) for g in parallel.gradients().values()) ** 0.5
    assert norm == pytest.approx(plain.norm), "gradients() are those before clipping"


class Normed(nn.Module):
    """BatchNorm in both stages, dropout, tied weights, a buffer that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.drop = nn.Dropout(0.3)
        self.last_norm = nn.BatchNorm1d(WIDTH)
        self.last = nn.Linear(WIDTH, WIDTH)
        self.last.weight = self.first.weight
        self.register_buffer("scale", torch.full((WIDTH,), 0.5), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(torch.relu(self.norm(self.first(x))))
        return self.last(self.last_norm(x) * self.scale)


def normed() -> Normed:
    torch.manual_seed(4)
    return Normed().double().train()


def test_batch_norm_statistics_are_those_of_the_model() -> None:
    parallel, plain = partition(normed()), Plain(normed())
    train_both(parallel, plain, BATCHES)
    state = parallel.state_dict()
    assert int(state["norm.num_batches_tracked"]) == 2 * len(BATCHES)
    assert not torch.equal(state["last_norm.running_mean"], normed().last_norm.running_mean)


def test_eval_switches_dropout_and_batch_norm_off_and_train_on_again() -> None:
    parallel, plain = partition(normed()), Plain(normed())
    train_both(parallel, plain, BATCHES[:1])
    parallel.eval()
    plain.model.eval()
    train_both(parallel, plain, BATCHES[1:2])
    assert int(parallel.state_dict()["norm.num_batches_tracked"]) == 2
    parallel.train()
    plain.model.train()
    train_both(parallel, plain, BATCHES[2:])
    assert int(parallel.state_dict()["norm.num_batches_tracked"]) == 4


@pytest.mark.parametrize("microbatches", [1, 2])
def test_inference_sees_the_trained_weights_and_statistics(microbatches: int) -> None:
    parallel, plain = (
        partition(normed(), microbatches=microbatches),
        Plain(normed(), rows=4 // microbatches),
    )
    train_both(parallel, plain, BATCHES)
    found = parallel(BATCHES[0][0])
    plain.model.load_state_dict(parallel.state_dict())
    plain.model.eval()
    with torch.no_grad():
        expected = plain.model(BATCHES[0][0])
    if microbatches == 1:
        assert torch.equal(found, expected)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_a_plan_for_inference_only() -> None:
    model = normed().eval()
    model.last_norm.running_mean.fill_(0.3)
    parallel = partition(model, batch()[0], mode="infer", loss_fn=None)
    with torch.no_grad():
        expected = model(batch()[0])
    torch.testing.assert_close(parallel(batch()[0]), expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(UsageError, match="plan is for inference"):
        parallel.train_step(*batch())


def test_programs_are_written_to_read(tmp_path: Path) -> None:
    parallel = partition_chain()
    folder = tmp_path / "new" / "programs"
    parallel.save_programs(folder)
    programs = parallel.planned.programs
    assert {path.name for path in folder.iterdir()} == {
        f"rank{program.rank}.{suffix}" for program in programs for suffix in ("py", "program")
    }
    for program in programs:
        assert parse_program((folder / f"rank{program.rank}.program").read_text()) == program
        source = (folder / f"rank{program.rank}.py").read_text()
        assert all(f"def stage_{stage.index}(" in source for stage in program.stages)
    with pytest.raises(UsageError, match="cannot make the program file"):
        parallel.save_programs(folder / "rank0.py")


def test_state_dict_has_the_keys_of_the_model_in_their_order() -> None:
    parallel = partition(normed())
    before = parallel.state_dict()
    assert_same(before, normed().state_dict(), 0.0)
    parallel.train_step(*batch())
    state = parallel.state_dict()
    assert list(state) == list(normed().state_dict())
    assert "scale" not in state
    assert state["last.weight"] is state["first.weight"] or torch.equal(
        state["last.weight"], state["first.weight"]
    )
    assert not torch.equal(state["first.weight"], before["first.weight"])
    normed().load_state_dict(state)


def test_what_state_dict_returns_is_a_copy() -> None:
    parallel = partition(normed())
    parallel.train_step(*batch())
    kept = parallel.state_dict()
    values = {name: tensor.clone() for name, tensor in kept.items()}
    parallel.train_step(*batch())
    assert_same(kept, values, 0.0)


def test_load_state_dict_before_and_after_the_first_step() -> None:
    trained = Plain(normed())
    trained.step(*batch(seed=9))
    state = trained.model.state_dict()
    for steps in (0, 1):
        make = lambda p: torch.optim.SGD(p, lr=1e-2)  # noqa: E731
        parallel = partition(normed(), optimizer=make)
        for _ in range(steps):
            parallel.train_step(*batch())
        parallel.load_state_dict(state)
        assert_same(parallel.state_dict(), state, 0.0)
        plain = Plain(trained.model, make)
        plain.steps = steps
        train_both(parallel, plain, BATCHES[:1])


def test_values_that_a_partial_state_lacks_stay_as_trained() -> None:
    parallel = partition(normed())
    parallel.train_step(*batch())
    state = parallel.state_dict()
    bias = {"last.bias": state["last.bias"] + 1.0}
    result = parallel.load_state_dict(bias, strict=False)
    assert "first.weight" in result.missing_keys
    assert "last.bias" not in result.missing_keys
    assert_same(parallel.state_dict(), state | bias, 0.0)


def test_load_state_dict_is_as_strict_as_the_model() -> None:
    parallel = partition(normed())
    parallel.train_step(*batch())
    state = parallel.state_dict()
    missing = {name: tensor for name, tensor in state.items() if name != "last.bias"}
    with pytest.raises(RuntimeError, match="Missing key.*last.bias"):
        parallel.load_state_dict(missing)
    with pytest.raises(RuntimeError, match="Unexpected key.*more"):
        parallel.load_state_dict({**state, "more": torch.zeros(1)})
    with pytest.raises(RuntimeError, match="size mismatch for last.bias"):
        parallel.load_state_dict({**state, "last.bias": torch.zeros(1)})
    assert_same(parallel.state_dict(), state, 0.0)


@pytest.mark.parametrize("stages", [1, 3])
def test_training_goes_on_the_same_under_another_stage_count(stages: int) -> None:
    parallel, plain = partition(normed()), Plain(normed())
    train_both(parallel, plain, BATCHES[:2])
    other = partition(normed(), stages=stages)
    other.load_state_dict(parallel.state_dict())
    other.load_optimizer_state_dict(parallel.optimizer_state_dict())
    train_both(other, plain, BATCHES)


def test_the_seed_decides_dropout_and_nothing_else_does() -> None:
    losses = [
        float(partition_chain(0.5, seed=seed, stages=stages).train_step(*batch()))
        for seed, stages in ((1, 2), (1, 3), (2, 2))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-13)
    assert losses[0] != pytest.approx(losses[2], rel=1e-6)
    parallel = partition_chain(0.5, optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    first, second = (float(parallel.train_step(*batch())) for _ in range(2))
    assert first != pytest.approx(second, rel=1e-6), "every step draws anew"


def test_gradients_need_to_be_kept() -> None:
    parallel, plain = partition_chain(keep_gradients=True), Plain(chain())
    train_both(parallel, plain, BATCHES[:1])
    assert_same(parallel.gradients(), plain.gradients())
    with pytest.raises(UsageError, match="keep_gradients"):
        partition_chain().gradients()


def test_a_call_that_cannot_be_captured_leaves_the_run_as_it_is() -> None:
    parallel, plain = partition_chain(), Plain(chain())
    train_both(parallel, plain, BATCHES[:1])
    with pytest.raises(CaptureError, match="fails on the example inputs"):
        parallel.train_step(torch.randn(4, 9).double(), torch.randn(4, 9).double())
    train_both(parallel, plain, BATCHES[1:])


def test_another_optimizer_state_is_refused() -> None:
    state = partition(normed()).optimizer_state_dict()
    with pytest.raises(UsageError, match="parameter groups"):
        partition_chain().load_optimizer_state_dict(state)


def test_the_rate_of_a_scheduler_resumes_with_the_optimizer() -> None:
    make = lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9)  # noqa: E731
    first = partition_chain(optimizer=make)
    first.train_step(*batch())
    first.optimizer.param_groups[0]["lr"] = 0.5
    second = partition_chain(optimizer=make, stages=1)
    second.load_optimizer_state_dict(first.optimizer_state_dict())
    assert second.optimizer.param_groups[0]["lr"] == 0.5
    assert second.optimizer_state_dict()["num_steps"] == 1


def test_a_session_of_another_size_is_refused() -> None:
    with pytest.raises(UsageError, match="the plan is for 2 ranks, the session has 3"):
        partition(chain(), session=InProcessSession(3))


def test_after_close_only_one_clear_error() -> None:
    parallel = partition_chain()
    parallel.train_step(*batch())
    parallel.close()
    parallel.close()
    for call in (
        lambda: parallel.train_step(*batch()),
        parallel.state_dict,
        lambda: parallel(batch()[0]),
    ):
        with pytest.raises(UsageError, match="closed"):
            call()
