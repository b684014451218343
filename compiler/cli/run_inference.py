"""`cutset run` with a plan for inference: the same batch some times, and how busy devices were.

With `--compare` the unpartitioned model infers on the same microbatches.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ..ir.errors import UsageError
from ..words import bytes_text
from .console import Console

if TYPE_CHECKING:
    from ..ir.plan import DeviceLoad, Plan
    from ..measure import MeasuredInference
    from .model_loader import LoadedModel

__all__ = ["run_inference"]

_TRAINING = ("save_checkpoint", "clip_grad_norm", "optimizer", "lr")


def run_inference(
    options: argparse.Namespace,
    plan: Plan,
    devices: object,
    loaded: LoadedModel,
    console: Console,
) -> None:
    """Infer with `plan` on `devices` and print what was measured.

    Raises:
        UsageError: an option is for training.
    """
    from ..api import auto_partition
    from ..chrome_trace import chrome_trace, write_chrome_trace
    from ..measure import measure_inference
    from ..reference import infer_reference, relative_error

    for name in _TRAINING:
        if getattr(options, name) is not None:
            raise UsageError(
                f"--{name.replace('_', '-')} is for training, the plan for inference",
                where=str(options.plan),
                ways_out=("leave it out", "plan with --mode train"),
            )
    with auto_partition(
        loaded.model,
        devices,  # type: ignore[arg-type]
        example_inputs=loaded.args,
        example_kwargs=loaded.kwargs,
        mode="infer",
        plan=plan,
        compile=options.compile,
        seed=options.seed,
        timeout_seconds=options.timeout,
        weights=options.weights,
        progress=console.progress,
    ) as parallel:
        if options.load_checkpoint is not None:
            parallel.load_checkpoint(options.load_checkpoint)
        if options.compare and options.weights is not None:
            loaded.model.load_state_dict(parallel.state_dict())
        measured = measure_inference(
            parallel, loaded.args, loaded.kwargs, steps=options.steps, progress=console.progress
        )
        if options.trace is not None and not console.quiet:
            trace = chrome_trace(parallel.trace(), title="measured")
            write_chrome_trace(options.trace, trace)
            console.note(f"wrote {options.trace}, the last of these steps")
    error = None
    if options.compare and not console.quiet:
        console.progress("infer with the unpartitioned model")
        reference = infer_reference(
            loaded.model, (loaded.args, loaded.kwargs), plan.num_microbatches
        )
        error = relative_error(dict(measured.outputs), reference)
    loads = plan.prediction.loads if plan.prediction is not None else ()
    predicted = plan.prediction.step_seconds if plan.prediction is not None else None
    data: dict[str, object] = {
        "step_seconds": measured.step_seconds,
        "predicted_step_seconds": predicted,
        "rows_per_second": plan.batch_size / measured.step_seconds,
        "busy_seconds": list(measured.busy_seconds),
        "predicted_busy_seconds": [load.total_seconds for load in loads] or None,
        "peak_memory_bytes": list(measured.peak_memory_bytes),
    }
    if error is not None:
        data["max_relative_error"] = {"outputs": error.value}
        data["worst"] = {"outputs": error.tensor}
    console.result(data, _text(plan, measured, loads, data))


def _text(
    plan: Plan,
    measured: MeasuredInference,
    loads: tuple[DeviceLoad, ...],
    data: dict[str, object],
) -> str:
    lines = [
        f"inference on {plan.batch_size} rows in {plan.num_microbatches} microbatches",
        f"seconds a step: {measured.step_seconds:.4g} measured"
        + (
            f", {data['predicted_step_seconds']:.4g} predicted"
            if data["predicted_step_seconds"] is not None
            else ""
        )
        + f"; {data['rows_per_second']:.4g} rows a second",
    ]
    predicted = {load.device: load.total_seconds for load in loads}
    for rank, busy in enumerate(measured.busy_seconds):
        peak = bytes_text(measured.peak_memory_bytes[rank])
        told = f", {predicted[rank]:.4g} predicted" if rank in predicted else ""
        lines.append(f"rank {rank}: busy {busy:.4g} s a microbatch{told}; peak {peak}")
    if "max_relative_error" in data:
        error, worst = data["max_relative_error"], data["worst"]
        assert isinstance(error, dict) and isinstance(worst, dict)
        lines.append(
            "largest relative error against the unpartitioned model: "
            f"outputs {error['outputs']:.2e}  {worst['outputs']}"
        )
    return "\n".join(lines)
