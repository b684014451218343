"""Unpartitioned training: what a partitioned run is compared with.

From a model, a batch and a number of microbatches, to the losses, inference outputs, first
gradients and last weights of plain eager autograd over the same microbatches, gradients
accumulated with weight (rows of the microbatch) / (rows of the batch), under the random streams
that the partitioned run draws from. `relative_errors` then measures the distance of another run.

The error of a tensor is max|a-b| / max(max|b|, 0.01 g), with g the largest max|b| of its kind: the
floor keeps a tensor that is zero but for rounding (a bias in front of BatchNorm has no gradient)
from dividing noise by noise.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..runtime.rng import ReplayRandomness, make_key
from .batch import Call, batch_size, microbatches_of
from .capture.signature import find_loss, num_targets
from .ir.counts import divisors
from .ir.errors import UsageError

__all__ = [
    "KINDS",
    "ReferenceRun",
    "WorstError",
    "flatten_outputs",
    "infer_reference",
    "relative_error",
    "relative_errors",
    "split_state",
    "train_reference",
]

KINDS = ("loss", "outputs", "gradients", "weights")
_FLOOR = 0.01

OptimizerFactory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
LossFunction = Callable[..., torch.Tensor]


@dataclass(frozen=True, slots=True)
class ReferenceRun:
    """Results of one run, partitioned or not.

    Args:
        losses: loss of every step.
        outputs: inference outputs with the initial weights, flattened and numbered.
        gradients: of the first step, before clipping, by parameter name.
        weights, buffers: the state dict after the last step.
        step_seconds: median time of a step; the first is left out if there are more.
    """

    losses: tuple[float, ...]
    outputs: Mapping[str, torch.Tensor]
    gradients: Mapping[str, torch.Tensor]
    weights: Mapping[str, torch.Tensor]
    buffers: Mapping[str, torch.Tensor]
    step_seconds: float


@dataclass(frozen=True, slots=True)
class WorstError:
    """The largest relative error of a kind of tensors, and the tensor that has it."""

    tensor: str
    value: float


@dataclass(slots=True)
class _Trainer:
    """Plain training of one model; its parameters change in place."""

    model: nn.Module
    loss_fn: LossFunction | None
    microbatches: tuple[Call, ...]
    optimizer: torch.optim.Optimizer
    seed: int
    clip_grad_norm: float | None
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)

    def step(self, number: int) -> float:
        """One optimizer step; keeps the gradients of step 0. Returns the loss."""
        self.optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for position, microbatch in enumerate(self.microbatches):
            with ReplayRandomness(make_key(self.seed, number, position)):
                loss = _loss(self.model, self.loss_fn, microbatch) / len(self.microbatches)
                loss.backward()
            total += float(loss.detach())
        if number == 0:
            self.gradients = {
                name: parameter.grad.clone()
                for name, parameter in self.model.named_parameters()
                if parameter.grad is not None
            }
        if self.clip_grad_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_grad_norm)
        self.optimizer.step()
        return total


def train_reference(
    model: nn.Module,
    args: tuple[object, ...],
    kwargs: Mapping[str, object] | None = None,
    *,
    loss_fn: LossFunction | None = None,
    optimizer: OptimizerFactory | None = None,
    num_microbatches: int = 1,
    steps: int = 1,
    seed: int = 0,
    clip_grad_norm: float | None = None,
) -> ReferenceRun:
    """Train a copy of `model` for `steps` steps on one batch, without partitioning it.

    Args:
        model: stays as it is, train / eval mode included.
        args, kwargs: the batch; with a `loss_fn` the last positional ones may be its targets.
        loss_fn: as for `auto_partition`; None: the model returns its loss.
        optimizer: makes the optimizer; AdamW with learning rate 1e-3 by default.
        num_microbatches: into how many parts the batch is split.
        steps: optimizer steps, all on the same batch.
        seed: of the random streams.
        clip_grad_norm: clip the global norm of the gradients to this.

    Raises:
        UsageError: the batch cannot be split.
        CaptureError: there is no loss in what the model returns.
    """
    model = copy.deepcopy(model)
    make = optimizer or (lambda parameters: torch.optim.AdamW(parameters, lr=1e-3))
    microbatches = _split((args, dict(kwargs or {})), num_microbatches)
    outputs = _infer(model, loss_fn, microbatches)
    trainer = _Trainer(model, loss_fn, microbatches, make(model.parameters()), seed, clip_grad_norm)
    losses, seconds = [], []
    for number in range(steps):
        begin = time.perf_counter()
        losses.append(trainer.step(number))
        seconds.append(time.perf_counter() - begin)
    return ReferenceRun(
        losses=tuple(losses),
        outputs=outputs,
        gradients=trainer.gradients,
        **split_state(model, model.state_dict()),
        step_seconds=statistics.median(seconds[1:] or seconds or [0.0]),
    )


def infer_reference(model: nn.Module, call: Call, num_microbatches: int) -> dict[str, torch.Tensor]:
    """Outputs of the unpartitioned model in eval mode, by path, over so many microbatches."""
    return _infer(model, None, _split(call, num_microbatches))


def split_state(
    model: nn.Module, state: Mapping[str, torch.Tensor]
) -> dict[str, dict[str, torch.Tensor]]:
    """A state dict of `model` as `weights` and `buffers`, which are kinds of their own."""
    names = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    return {
        "weights": {name: item for name, item in state.items() if name not in names},
        "buffers": {name: item for name, item in state.items() if name in names},
    }


def _split(call: Call, num_microbatches: int) -> tuple[Call, ...]:
    rows = batch_size(*call)
    if num_microbatches not in divisors(rows):
        raise UsageError(
            f"a batch of {rows} rows cannot be split into {num_microbatches} equal microbatches",
            ways_out=(f"legal counts here: {', '.join(map(str, divisors(rows)))}",),
        )
    return tuple(microbatches_of(call, rows // num_microbatches))


def _call(model: nn.Module, loss_fn: LossFunction | None, call: Call) -> object:
    args, kwargs = call
    return model(*args[: len(args) - num_targets(loss_fn)], **kwargs)


def _loss(model: nn.Module, loss_fn: LossFunction | None, call: Call) -> torch.Tensor:
    output = _call(model, loss_fn, call)
    if loss_fn is not None:
        args, _ = call
        return loss_fn(output, *args[len(args) - num_targets(loss_fn) :])
    return find_loss(output)


def _infer(
    model: nn.Module, loss_fn: LossFunction | None, microbatches: tuple[Call, ...]
) -> dict[str, torch.Tensor]:
    """Outputs in eval mode, microbatches joined as the partitioned run joins them."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    with torch.no_grad():
        parts = [flatten_outputs(_call(model, loss_fn, call)) for call in microbatches]
    for module, training in modes.items():
        module.training = training
    rows = batch_size(*microbatches[0])
    return {name: _join([part[name] for part in parts], rows) for name in parts[0]}


def flatten_outputs(output: object) -> dict[str, torch.Tensor]:
    """Tensors in what a model returns, by path (`.logits`, `[0]`)."""
    leaves, _ = pytree.tree_flatten_with_path(output)
    return {
        pytree.keystr(path) or "output": leaf
        for path, leaf in leaves
        if isinstance(leaf, torch.Tensor)
    }


def _join(parts: list[torch.Tensor], rows: int) -> torch.Tensor:
    if len(parts) == 1:
        return parts[0]
    if parts[0].ndim == 0:
        return torch.stack(parts).mean(0)
    return torch.cat(parts) if parts[0].shape[0] == rows else parts[-1]


def relative_error(
    ours: Mapping[str, torch.Tensor], reference: Mapping[str, torch.Tensor]
) -> WorstError:
    """Largest error over tensors of one kind; see the module docstring for its definition.

    A tensor that only one side has counts as zeros on the other. A NaN, or a difference of shape,
    is an infinite error.
    """
    largest = max((_magnitude(tensor) for tensor in reference.values()), default=0.0)
    worst = WorstError("", 0.0)
    for name in sorted({*ours, *reference}):
        mine, theirs = ours.get(name), reference.get(name)
        mine = torch.zeros_like(theirs) if mine is None and theirs is not None else mine
        theirs = torch.zeros_like(mine) if theirs is None and mine is not None else theirs
        assert mine is not None and theirs is not None
        error = _tensor_error(mine, theirs, _FLOOR * largest)
        if error > worst.value or not worst.tensor:
            worst = WorstError(name, error)
    return worst


def relative_errors(ours: ReferenceRun, reference: ReferenceRun) -> dict[str, WorstError]:
    """The worst tensor of each kind in `KINDS`; buffers, with a floor of their own, as weights."""
    weights = relative_error(ours.weights, reference.weights)
    buffers = relative_error(ours.buffers, reference.buffers)
    return {
        "loss": relative_error(_by_step(ours.losses), _by_step(reference.losses)),
        "outputs": relative_error(ours.outputs, reference.outputs),
        "gradients": relative_error(ours.gradients, reference.gradients),
        "weights": weights if weights.value >= buffers.value else buffers,
    }


def _by_step(losses: tuple[float, ...]) -> dict[str, torch.Tensor]:
    return {
        f"step {number}": torch.tensor(loss, dtype=torch.float64)
        for number, loss in enumerate(losses)
    }


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    wide = torch.complex128 if tensor.is_complex() else torch.float64
    return tensor.detach().to("cpu", wide)


def _magnitude(tensor: torch.Tensor) -> float:
    return float(_wide(tensor).abs().max()) if tensor.numel() else 0.0


def _tensor_error(mine: torch.Tensor, theirs: torch.Tensor, floor: float) -> float:
    if mine.shape != theirs.shape:
        return math.inf
    difference = _magnitude(_wide(mine) - _wide(theirs))
    if difference == 0.0:
        return 0.0
    scale = max(_magnitude(theirs), floor)
    return difference / scale if scale > 0.0 and math.isfinite(difference) else math.inf
