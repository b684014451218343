"""What a partitioned run did: the figures and tensors that are compared with the reference.

From a `Parallel` and one batch to a `ReferenceRun` of the same shape as `train_reference` makes,
and the peak memory of every rank, measured in one more step after the weights were taken; or, for
inference, to its outputs and how long each rank was busy.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from .capture.signature import LossFunction, num_targets
from .reference import ReferenceRun, flatten_outputs, split_state

if TYPE_CHECKING:
    from .parallel import Parallel

__all__ = ["MeasuredInference", "MeasuredRun", "measure_inference", "measure_training"]


@dataclass(frozen=True, slots=True)
class MeasuredRun:
    """A partitioned run; outputs, gradients and weights are empty unless it is to be compared."""

    run: ReferenceRun
    peak_memory_bytes: tuple[int, ...]


def measure_training(
    parallel: Parallel,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    loss_fn: LossFunction | None = None,
    steps: int = 1,
    compare: bool = False,
    after_steps: Callable[[], None] = lambda: None,
    progress: Callable[[str], None] = lambda line: None,
) -> MeasuredRun:
    """Train `steps` steps on one batch.

    Args:
        parallel: partitioned for training, with `keep_gradients=True` if `compare`.
        args, kwargs: the batch, targets included.
        loss_fn: the one that `parallel` was made with; tells which of `args` are targets.
        steps: optimizer steps.
        compare: also collect outputs (before training), gradients (first step) and weights (last).
        after_steps: called after the last step, before memory is measured in one more.
        progress: receives one line a step.
    """
    named = dict(kwargs or {})
    outputs: dict[str, torch.Tensor] = {}
    gradients: dict[str, torch.Tensor] = {}
    state: dict[str, torch.Tensor] = {}
    if compare:
        progress("infer with the initial weights")
        inputs = args[: len(args) - num_targets(loss_fn)]
        outputs = flatten_outputs(parallel(*inputs, **named))
    losses, seconds = [], []
    for step in range(steps):
        begin = time.perf_counter()
        losses.append(float(parallel.train_step(*args, **named)))
        seconds.append(time.perf_counter() - begin)
        progress(f"step {step}: loss {losses[-1]:.6g}, {seconds[-1]:.3f} s")
        if compare and step == 0:
            gradients = parallel.gradients()
    if compare:
        state = parallel.state_dict()
    after_steps()
    progress("measure memory in one more step")
    parallel.measure_memory()
    parallel.train_step(*args, **named)
    run = ReferenceRun(
        losses=tuple(losses),
        outputs=outputs,
        gradients=gradients,
        **split_state(parallel.model, state),
        step_seconds=statistics.median(seconds[1:] or seconds),
    )
    return MeasuredRun(run, tuple(parallel.peak_memory_bytes()))


@dataclass(frozen=True, slots=True)
class MeasuredInference:
    """Inference steps on one batch.

    Args:
        outputs: flattened and numbered.
        step_seconds: median time of a step.
        busy_seconds: of every rank, the median over steps of the time for which it worked, a
            microbatch (see `Parallel.busy_seconds`).
    """

    outputs: Mapping[str, torch.Tensor]
    step_seconds: float
    busy_seconds: tuple[float, ...]
    peak_memory_bytes: tuple[int, ...]


def measure_inference(
    parallel: Parallel,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    steps: int = 1,
    progress: Callable[[str], None] = lambda line: None,
) -> MeasuredInference:
    """Infer `steps` times on one batch, after one time that does not count."""
    named = dict(kwargs or {})
    count = parallel.plan.num_microbatches
    outputs = flatten_outputs(parallel(*args, **named))
    seconds, busy = [], []
    for step in range(steps):
        parallel.record_trace()
        begin = time.perf_counter()
        parallel(*args, **named)
        seconds.append(time.perf_counter() - begin)
        busy.append([work / count for work in parallel.busy_seconds()])
        progress(f"step {step}: {seconds[-1]:.3f} s")
    progress("measure memory in one more step")
    parallel.measure_memory()
    parallel(*args, **named)
    return MeasuredInference(
        outputs=outputs,
        step_seconds=statistics.median(seconds),
        busy_seconds=tuple(statistics.median(column) for column in zip(*busy, strict=True)),
        peak_memory_bytes=tuple(parallel.peak_memory_bytes()),
    )
