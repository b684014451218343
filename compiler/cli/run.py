"""`cutset run`: run a model with a plan, and compare it with the unpartitioned model.

With `--compare` the same steps are taken by plain eager autograd (`compiler/reference.py`), from
the same values and under the same random streams. A plan for inference is run by
`run_inference.py`.
"""

from __future__ import annotations

import argparse
import copy
import math
from pathlib import Path
from typing import TYPE_CHECKING

from ..ir.errors import UsageError
from ..words import bytes_text
from .command import (
    Command,
    add_model_arguments,
    add_optimizer_arguments,
    positive_float,
    positive_int,
)
from .console import Console

if TYPE_CHECKING:
    from torch import nn

    from ..ir.cluster import Cluster
    from ..ir.plan import Plan
    from ..measure import MeasuredRun
    from ..parallel import Parallel
    from ..reference import ReferenceRun
    from .model_loader import LoadedModel

__all__ = ["COMMAND"]


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="FILE.py:FACTORY")
    parser.add_argument("--plan", required=True, type=Path, metavar="PLAN")
    parser.add_argument("--steps", type=positive_int, default=3, metavar="N")
    parser.add_argument(
        "--compare", action="store_true", help="also run the unpartitioned model; show the errors"
    )
    parser.add_argument(
        "--clip-grad-norm", type=positive_float, metavar="NORM", help="clip the global norm"
    )
    parser.add_argument(
        "--compile", action="store_true", help="run the stage graphs through Inductor"
    )
    parser.add_argument(
        "--timeout", type=positive_float, default=300.0, metavar="SECONDS", help="of every wait"
    )
    parser.add_argument(
        "--weights", type=Path, metavar="PATH", help="first values: a file, a directory of weights"
    )
    parser.add_argument(
        "--load-checkpoint", type=Path, metavar="DIR", help="go on from what another run has saved"
    )
    parser.add_argument(
        "--save-checkpoint", type=Path, metavar="DIR", help="write a checkpoint after the last step"
    )
    parser.add_argument(
        "--trace",
        type=Path,
        metavar="FILE",
        help="record one more step (of inference, the last), for chrome://tracing or Perfetto, as "
        "simulate --trace does",
    )
    add_model_arguments(parser)
    add_optimizer_arguments(parser)


def _run(options: argparse.Namespace, console: Console) -> None:
    from ...runtime.launcher import job_rank
    from ..api import auto_partition
    from ..checkpoint import refuse_existing
    from ..files import check_target
    from ..plan_json import load_plan
    from ..reference import train_reference
    from .model_loader import choose_optimizer, for_inference
    from .run_inference import run_inference

    console.quiet = job_rank() > 0
    if options.trace is not None and not console.quiet:
        check_target(options.trace, "trace")
    plan = load_plan(options.plan)
    if plan.mode.value != "train":
        loaded = for_inference(_loaded(options, console))
        run_inference(options, plan, _devices_here(plan), loaded, console)
        return
    if options.save_checkpoint is not None:
        refuse_existing(options.save_checkpoint)  # not only after the last step
    loaded = _loaded(options, console)
    factory = choose_optimizer(loaded, options.optimizer, options.lr)
    wants_reference = options.compare and not console.quiet
    pristine = copy.deepcopy(loaded.model) if wants_reference else None
    with auto_partition(
        loaded.model,
        _devices_here(plan),
        example_inputs=loaded.args,
        example_kwargs=loaded.kwargs,
        loss_fn=loaded.loss_fn,
        optimizer=factory,
        plan=plan,
        compile=options.compile,
        seed=options.seed,
        clip_grad_norm=options.clip_grad_norm,
        keep_gradients=options.compare,
        timeout_seconds=options.timeout,
        weights=options.weights,
        progress=console.progress,
    ) as parallel:
        measured = _measured(parallel, pristine, loaded, options, console)
    reference = None
    if pristine is not None:
        console.progress("train the unpartitioned model")
        reference = train_reference(
            pristine,
            loaded.args,
            loaded.kwargs,
            loss_fn=loaded.loss_fn,
            optimizer=factory,
            num_microbatches=plan.num_microbatches,
            steps=options.steps,
            seed=options.seed,
            clip_grad_norm=options.clip_grad_norm,
        )
    predicted = plan.prediction.step_seconds if plan.prediction else None
    console.result(
        _as_json(measured, reference, predicted), _as_text(measured, reference, predicted)
    )


def _measured(
    parallel: Parallel,
    pristine: nn.Module | None,
    loaded: LoadedModel,
    options: argparse.Namespace,
    console: Console,
) -> MeasuredRun:
    """Train; `pristine`, the model to compare with, gets the same first values."""
    from ..chrome_trace import chrome_trace, write_chrome_trace
    from ..measure import measure_training

    if options.load_checkpoint is not None:
        console.progress(f"load {options.load_checkpoint}")
        parallel.load_checkpoint(options.load_checkpoint)
    if options.compare and options.weights is not None:
        state = parallel.state_dict()  # of all ranks, which all ask for it
        if pristine is not None:
            pristine.load_state_dict(state)

    def keep() -> None:
        if options.save_checkpoint is not None:
            console.progress(f"save {options.save_checkpoint}")
            parallel.save_checkpoint(options.save_checkpoint)
        if options.trace is not None:
            console.progress("trace one more step")
            parallel.record_trace()
            parallel.train_step(*loaded.args, **loaded.kwargs)
            if not console.quiet:
                trace = chrome_trace(parallel.trace(), title="measured")
                write_chrome_trace(options.trace, trace)
                console.note(f"wrote {options.trace}")

    return measure_training(
        parallel,
        loaded.args,
        loaded.kwargs,
        loss_fn=loaded.loss_fn,
        steps=options.steps,
        compare=options.compare,
        after_steps=keep,
        progress=console.progress,
    )


def _devices_here(plan: Plan) -> str | Cluster:
    """Devices of this machine like those of the plan, for it to be checked against."""
    cluster = plan.cluster
    kinds = {(entry.backend, entry.threads, entry.unsupported_ops) for entry in cluster.types}
    backend, *special = next(iter(kinds))
    if not cluster.local or len(kinds) > 1 or any(special):
        return cluster
    return f"{backend}:{len(cluster.devices)}"


def _loaded(options: argparse.Namespace, console: Console) -> LoadedModel:
    from .model_loader import load_model

    console.progress(f"load {options.model}")
    if options.compare and options.load_checkpoint is not None:
        raise UsageError(
            "the unpartitioned model does not start from a checkpoint's optimizer",
            where="--compare",
            ways_out=("leave --compare out", "pass the checkpoint as --weights"),
        )
    loaded = load_model(options.model, seed=options.seed, dtype=options.dtype)
    has_values = options.weights is not None or options.load_checkpoint is not None
    if loaded.has_meta_inputs or (loaded.is_meta and not has_values):
        raise UsageError(
            "the model or its inputs are on the meta device: they can be planned, not run",
            where=options.model,
            ways_out=(
                "pass --weights or --load-checkpoint for the model's values",
                "make them on the cpu",
                "use `cutset plan` and `cutset simulate`",
            ),
        )
    if loaded.is_meta and options.compare:
        raise UsageError(
            "the unpartitioned model is on the meta device: it does not run",
            where="--compare",
            ways_out=("leave --compare out", "make the model on the cpu"),
        )
    return loaded


def _as_json(
    measured: MeasuredRun, reference: ReferenceRun | None, predicted: float | None
) -> dict[str, object]:
    from ..reference import relative_errors

    data: dict[str, object] = {
        "losses": list(measured.run.losses),
        "step_seconds": measured.run.step_seconds,
        "predicted_step_seconds": predicted,
        "peak_memory_bytes": list(measured.peak_memory_bytes),
    }
    if reference is None:
        return data
    errors = relative_errors(measured.run, reference)
    return {
        "max_relative_error": {kind: _finite(worst.value) for kind, worst in errors.items()},
        "worst": {kind: worst.tensor for kind, worst in errors.items()},
        **data,
        "reference_losses": list(reference.losses),
        "reference_step_seconds": reference.step_seconds,
    }


def _finite(error: float) -> float | None:
    """JSON has no infinity: null says that a tensor cannot be compared (NaN, another shape)."""
    return error if math.isfinite(error) else None


def _as_text(measured: MeasuredRun, reference: ReferenceRun | None, predicted: float | None) -> str:
    from ..reference import relative_errors

    losses = measured.run.losses
    lines = [
        f"{len(losses)} steps, loss {losses[0]:.6g} -> {losses[-1]:.6g}",
        f"seconds a step: {measured.run.step_seconds:.4g} measured"
        + (f", {predicted:.4g} predicted" if predicted is not None else "")
        + (f", {reference.step_seconds:.4g} unpartitioned" if reference else ""),
        "peak memory: "
        + ", ".join(
            f"rank {rank} {bytes_text(peak)}"
            for rank, peak in enumerate(measured.peak_memory_bytes)
        ),
    ]
    if reference is not None:
        lines.append("largest relative error against the unpartitioned model:")
        lines.extend(
            f"  {kind:<10} {worst.value:.2e}  {worst.tensor}"
            for kind, worst in relative_errors(measured.run, reference).items()
        )
    return "\n".join(lines)


COMMAND = Command(
    name="run",
    summary="run a model with a plan over local processes, or as ranks of torchrun",
    examples=(
        "cutset run model.py:build --plan plan.json --steps 5",
        "cutset run model.py:build --plan plan.json --steps 3 --compare --dtype float64 --json",
        "cutset run model.py:build --plan plan.json --weights model.safetensors "
        "--save-checkpoint step5",
        "torchrun --nproc-per-node 4 -m cutset run model.py:build --plan plan.json --steps 5",
    ),
    configure=_configure,
    run=_run,
)
