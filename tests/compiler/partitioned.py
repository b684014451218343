"""Small models trained twice: partitioned with all ranks in this process, and by plain torch."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cutset.compiler.api import auto_partition, plan_model
from cutset.compiler.batch import batch_size, microbatches_of
from cutset.compiler.capture.signature import find_loss, num_targets
from cutset.compiler.ir.mesh import Mesh
from cutset.compiler.parallel import Parallel, RunOptions
from cutset.compiler.planned import PlannedModel, build_programs
from cutset.runtime.inprocess import InProcessSession
from cutset.runtime.rng import ReplayRandomness, make_key
from tests.exactness.harness import in_stage, layouts_over, spread

WIDTH = 6
ROWS = 4


class Chain(nn.Module):
    """A few linears: enough for two stages."""

    def __init__(self, depth: int = 3, dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(depth))
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + self.drop(torch.tanh(layer(x)))
        return x


def chain(dropout: float = 0.0, dtype: torch.dtype = torch.float64) -> Chain:
    """The same weights on every call."""
    torch.manual_seed(3)
    return Chain(dropout=dropout).to(dtype).train()


def batch(rows: int = ROWS, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs and targets of a chain."""
    source = torch.Generator().manual_seed(seed)
    shape = (rows, WIDTH)
    return (
        torch.randn(shape, generator=source, dtype=torch.float64),
        torch.randn(shape, generator=source, dtype=torch.float64),
    )


def partition(
    model: nn.Module, *args: Any, stages: int = 2, microbatches: int = 2, **options: Any
) -> Parallel:
    """Partition over so many ranks of this process; a chain's loss unless told otherwise."""
    options.setdefault("loss_fn", F.mse_loss)
    options.setdefault("check", False)
    options.setdefault("session", InProcessSession(stages))
    return auto_partition(
        model,
        stages,
        example_inputs=args or batch(),
        num_stages=stages,
        num_microbatches=microbatches,
        **options,
    )


@functools.cache
def _planned_chain(dropout: float, stages: int) -> PlannedModel:
    return plan_model(
        chain(dropout),
        stages,
        example_inputs=batch(),
        loss_fn=F.mse_loss,
        num_stages=stages,
        num_microbatches=2,
        check=False,
    )


def partition_chain(dropout: float = 0.0, stages: int = 2, **options: Any) -> Parallel:
    """As `partition(chain(dropout))`, captured and planned once; its model must not be changed."""
    options.setdefault("optimizer", lambda parameters: torch.optim.AdamW(parameters, lr=1e-3))
    run = RunOptions(loss_fn=F.mse_loss, **options)
    return Parallel(_planned_chain(dropout, stages), run, InProcessSession(stages))


def plan_over(
    model: nn.Module,
    mesh: Mesh,
    *args: Any,
    loss_fn: Callable[..., Tensor] = F.mse_loss,
    microbatches: int = 2,
    seed: int | None = None,
    clip: float | None = None,
) -> PlannedModel:
    """Planned over a mesh whose axis `pipeline`, if it has one, gives the stages; under random
    layouts, or flowing ones if there is no seed."""
    stages, inner = mesh.axis("pipeline").size, in_stage(mesh)
    planned = plan_model(
        model,
        stages,
        example_inputs=args,
        loss_fn=loss_fn,
        num_stages=stages,
        num_microbatches=microbatches,
        check=False,
    )
    plan = spread(planned.plan, inner, layouts_over(planned.captured.graph, inner, seed))
    return replace(planned, plan=plan, programs=build_programs(planned.captured, plan, clip))


class Plain:
    """Unpartitioned training of a copy of a model, with the partitioned run's random streams."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Callable[[Any], torch.optim.Optimizer] | None = None,
        *,
        loss_fn: Callable[..., Tensor] | None = F.mse_loss,
        rows: int = 2,
        seed: int = 0,
        clip: float | None = None,
    ) -> None:
        self.model = copy.deepcopy(model)
        make = optimizer or (lambda parameters: torch.optim.AdamW(parameters, lr=1e-3))
        self.optimizer = make(self.model.parameters())
        self.loss_fn = loss_fn
        self.rows = rows
        self.seed = seed
        self.clip = clip
        self.steps = 0
        self.norm = 0.0

    def step(self, *args: Any, **kwargs: Any) -> float:
        """One optimizer step over microbatches of `rows` rows; the mean loss."""
        self.optimizer.zero_grad(set_to_none=True)
        count = batch_size(args, kwargs) // self.rows
        losses = []
        for position, (inputs, named) in enumerate(microbatches_of((args, kwargs), self.rows)):
            with ReplayRandomness(make_key(self.seed, self.steps, position)):
                split = len(inputs) - num_targets(self.loss_fn)
                result = self.model(*inputs[:split], **named)
                loss = self.loss_fn(result, *inputs[split:]) if self.loss_fn else find_loss(result)
                (loss / count).backward()
            losses.append(float(loss.detach()))
        if self.clip is not None:
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
            self.norm = float(norm)
        self.optimizer.step()
        self.steps += 1
        return sum(losses) / count

    def gradients(self) -> dict[str, Tensor]:
        return {n: p.grad for n, p in self.model.named_parameters() if p.grad is not None}


def assert_same(
    ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 1e-12
) -> None:
    """Same names in the same order, same tensors up to rounding."""
    assert list(ours) == list(theirs)
    for name, tensor in theirs.items():
        assert ours[name].shape == tensor.shape, name
        assert ours[name].dtype == tensor.dtype, name
        torch.testing.assert_close(
            ours[name], tensor, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def train_both(
    parallel: Parallel, plain: Plain, batches: Sequence[tuple[Any, ...]], tolerance: float = 1e-12
) -> None:
    """Train both on the same batches; losses and state must stay the same."""
    for inputs in batches:
        loss, expected = float(parallel.train_step(*inputs)), plain.step(*inputs)
        assert abs(loss - expected) <= tolerance * max(1.0, abs(expected))
    assert_same(parallel.state_dict(), plain.model.state_dict(), tolerance)
