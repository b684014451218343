"""Translation validation: does the partitioned program compute what the model computes?

The model is copied to float64, captured again under the same plan, and its programs run for real,
instruction by instruction, with all ranks in this process over a simulated network. Loss, outputs
and gradients must equal those of the unpartitioned copy to rounding.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ..passes.transfer import carried_over
from ..runtime.inprocess import InProcessSession
from .batch import Call, signature_of, take_rows
from .capture import capture
from .ir.cluster import Cluster
from .ir.errors import VerificationError
from .ir.graph import Mode
from .measure import measure_training
from .parallel import Parallel, RunOptions
from .planned import PlannedModel, build_programs
from .reference import (
    WorstError,
    flatten_outputs,
    infer_reference,
    relative_error,
    relative_errors,
    train_reference,
)

__all__ = ["verify_numerically"]

TOLERANCE = 1e-9
_ROUNDED = {torch.float32: 1e-4, torch.float16: 5e-2, torch.bfloat16: 5e-2}
"""Where a model computes in such a type even in float64 (llama's norms do), it rounds what comes
out of sums over ranks, and those are taken in another order."""


def verify_numerically(planned: PlannedModel, *, seed: int = 0) -> dict[str, float]:
    """Largest relative error of loss, outputs and gradients (see `reference.py`) in float64.

    Args:
        planned: a real model (not on `meta`) with its plan and programs.
        seed: of the random streams.

    Raises:
        VerificationError: an error exceeds 1e-9, or what the types that the model insists on
            allow; names the tensor.
    """
    wide = _in_float64(planned)
    factory = _plain_sgd
    session = InProcessSession(len(wide.programs))
    options = RunOptions(loss_fn=wide.loss_fn, optimizer=factory, seed=seed, keep_gradients=True)
    parallel = Parallel(wide, options, session)
    count = wide.plan.num_microbatches
    if wide.plan.mode is Mode.INFER:
        args, kwargs = wide.call
        ours = flatten_outputs(parallel(*args, **kwargs))
        errors = {"outputs": relative_error(ours, infer_reference(wide.model, wide.call, count))}
    else:
        args, kwargs = wide.call
        measured = measure_training(
            parallel, args, kwargs, loss_fn=wide.loss_fn, steps=1, compare=True
        )
        reference = train_reference(
            wide.model,
            args,
            kwargs,
            loss_fn=wide.loss_fn,
            optimizer=factory,
            num_microbatches=count,
            steps=1,
            seed=seed,
        )
        errors = relative_errors(measured.run, reference)
    _check(errors, type(planned.model).__name__, _tolerance(wide))
    return {kind: error.value for kind, error in errors.items()}


def _plain_sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1e-3)


def _in_float64(planned: PlannedModel) -> PlannedModel:
    """The same plan for a copy of the model in float64."""
    model = copy.deepcopy(planned.model).double()
    call: Call = tree_map_only(Tensor, _widened, planned.call)
    rows = planned.plan.batch_size // planned.plan.num_microbatches
    micro = take_rows(call, rows)
    captured = capture(
        model,
        *micro,
        mode=planned.plan.mode,
        loss_fn=planned.loss_fn if planned.plan.mode is Mode.TRAIN else None,
        check=False,
    )
    graphs = planned.captured.graph, captured.graph
    alike = [node.op for node in graphs[0].nodes] == [node.op for node in graphs[1].nodes]
    plan = replace(
        carried_over(planned.plan, *graphs),
        cluster=_boundless(planned.plan.cluster),
        recomputed=planned.plan.recomputed if alike else (),
    )
    return replace(
        planned,
        model=model,
        captured=captured,
        plan=plan,
        programs=build_programs(captured, plan),
        call_signature=signature_of(micro),
        call=call,
    )


def _widened(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _boundless(cluster: Cluster) -> Cluster:
    """`cluster` with memory for tensors of any width."""
    types = tuple(replace(item, memory_bytes=1 << 60) for item in cluster.types)
    return replace(cluster, types=types)


def _tolerance(planned: PlannedModel) -> float:
    if planned.plan.stage_mesh.size == 1 and not planned.plan.is_mixed:
        return TOLERANCE
    carried = {v.type.dtype for v in planned.captured.graph.values if v.type.is_float}
    return max([TOLERANCE, *(_ROUNDED[dtype] for dtype in carried if dtype in _ROUNDED)])


def _check(errors: dict[str, WorstError], name: str, tolerance: float) -> None:
    for kind, error in errors.items():
        if error.value > tolerance:
            raise VerificationError(
                f"the partitioned {kind} differ from the model's by {error.value:.2e} relative "
                f"(at most {tolerance:.0e} in float64), worst in {error.tensor}",
                where=f"model {name}",
                ways_out=("report this plan and model: a program must never differ",),
            )
