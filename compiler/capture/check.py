"""Self-check after capture: the graph's loss, outputs and gradients against the model's own.

Export loses some effects on gradients in silence (see `gradients.py`), and then the loss is exact
and the gradients are wrong. So whenever the model is real, it runs once forward and backward, the
graph does so too under the same random streams, and all gradients are compared. The error of a
tensor is max|a-b| / max(max|b|, 0.01 g), where g is the largest max|b| of its kind: a tensor
that is zero but for rounding would otherwise divide noise by noise.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ...runtime.rng import ReplayRandomness, make_key
from ..ir.errors import CaptureError
from ..ir.graph import Graph, OutputKind
from .export import call_model, mode_of
from .interpret import run_graph
from .signature import LossFunction, OutputSignature
from .state import same_contents

if TYPE_CHECKING:
    from .capture import Captured

__all__ = ["check_against_model", "largest_error"]

_FLOOR = 0.01


def check_against_model(
    captured: Captured, model: nn.Module, tensors: list[Tensor], *, loss_fn: LossFunction | None
) -> None:
    """Compare graph and model on the example inputs.

    Buffers, gradients and generators of the caller are left as they were. Costs one forward and,
    in TRAIN mode, one backward pass of each.

    Raises:
        CaptureError: names the worst loss, output, buffer or gradient.
    """
    graph = captured.graph
    key = make_key(0x5EED, 0, 0)
    limit = _tolerance(graph)
    with mode_of(model, graph.mode), _undisturbed(model):
        try:
            theirs = _run_model(captured, model, tensors, key, loss_fn)
        except RuntimeError as error:
            raise _broken(graph, "the model itself", error) from error
    with mode_of(model, graph.mode):
        try:
            ours = _run_graph(captured, model, tensors, key)
        except RuntimeError as error:
            raise _broken(graph, "the captured graph", error) from error
    for kind in theirs:
        name, distance = largest_error(ours[kind], theirs[kind])
        if not distance <= limit:
            raise CaptureError(
                f"the captured graph computes other {kind} than the model: relative error "
                f"{distance:.2g} at {name} (limit {limit:.1g})",
                where=f"self-check of {graph.name}",
                ways_out=(
                    "the model may draw random numbers outside torch, change state between calls, "
                    "or alter gradients in a way that capture does not see: make it a function "
                    "of its inputs, parameters and buffers",
                    "check=False skips this check, at your own risk",
                ),
            )


def _broken(graph: Graph, what: str, error: RuntimeError) -> CaptureError:
    return CaptureError(
        f"{what} fails on the example inputs: {str(error).splitlines()[0]}",
        where=f"self-check of {graph.name}",
        ways_out=("call the model on the example inputs, and backward() on its loss, to see why",),
    )


Results = dict[str, dict[str, Tensor]]


def _run_model(
    captured: Captured,
    model: nn.Module,
    tensors: list[Tensor],
    key: Tensor,
    loss_fn: LossFunction | None,
) -> Results:
    graph = captured.graph
    copies = [tensor.clone() for tensor in tensors]
    with ReplayRandomness(key):
        loss, result = call_model(model, captured.inputs, copies, mode=graph.mode, loss_fn=loss_fn)
        _, outputs = OutputSignature.of(result, captured.inputs.rows)
        results: Results = {"buffers": _buffers(model), "outputs": {}}
        if graph.outputs_of(OutputKind.USER):
            results["outputs"] = {str(place): item for place, item in enumerate(outputs)}
        if loss is not None:
            results["loss"] = {"the loss": loss}
            results["gradients"] = _gradients(loss, model)
    return _detached(results)


def _run_graph(captured: Captured, model: nn.Module, tensors: list[Tensor], key: Tensor) -> Results:
    graph = captured.graph
    leaves = captured.inputs.tensor_leaves
    given = {leaf.origin: tensor for leaf, tensor in zip(leaves, tensors, strict=True)}
    given.update(captured.tensors)
    values = run_graph(graph, given, key=key)
    results: Results = {"buffers": _buffers(model), "outputs": {}}
    for output, value in zip(graph.outputs, values, strict=True):
        if output.kind is OutputKind.LOSS:
            results["loss"] = {"the loss": value}
            results["gradients"] = _gradients(value, model)
        else:
            kind = "buffers" if output.kind is OutputKind.BUFFER else "outputs"
            results[kind][output.target] = value
    return _detached(results)


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    """All of them: a change that the graph has lost shows as well."""
    return {name: buffer.detach().clone() for name, buffer in model.named_buffers()}


def _gradients(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    """Gradients of all parameters, which the graph reads too; zeros where there is none."""
    wanted = {name: item for name, item in model.named_parameters() if item.requires_grad}
    found: Sequence[Tensor | None] = torch.autograd.grad(
        loss, list(wanted.values()), allow_unused=True
    )
    return {
        name: torch.zeros_like(wanted[name]) if gradient is None else gradient
        for name, gradient in zip(wanted, found, strict=True)
    }


def _detached(results: Results) -> Results:
    return {
        kind: {name: tensor.detach() for name, tensor in tensors.items()}
        for kind, tensors in results.items()
    }


@contextlib.contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Put the model and Python's generator back afterwards; torch's is kept by the replay."""
    state = random.getstate()
    try:
        with same_contents(model):
            yield
    finally:
        random.setstate(state)


def _tolerance(graph: Graph) -> float:
    """Half the root of the coarsest float type's epsilon: sums may run in another order."""
    kinds = {value.type.dtype for value in graph.values if value.type.dtype.is_floating_point}
    return 0.5 * math.sqrt(max((torch.finfo(kind).eps for kind in kinds), default=1e-7))


def largest_error(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> tuple[str, float]:
    """Name and relative error of the worst tensor; see the module docstring for its definition."""
    floor = _FLOOR * max((_magnitude(tensor) for tensor in theirs.values()), default=0.0)
    worst = ("", 0.0)
    for name, reference in theirs.items():
        difference = _difference(ours[name], reference)
        scale = max(_magnitude(reference), floor)
        error = difference / scale if difference else 0.0
        if not error <= worst[1]:
            worst = (name, error)
    return worst


def _magnitude(tensor: Tensor) -> float:
    finite = torch.nan_to_num(_wide(tensor), nan=0.0, posinf=0.0, neginf=0.0)
    return float(finite.abs().max()) if tensor.numel() else 0.0


def _difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference; infinities and NaNs must stand in the same places."""
    if ours.shape != theirs.shape:
        return math.inf
    mine, reference = _wide(ours), _wide(theirs)
    same = (mine == reference) | (mine.isnan() & reference.isnan())
    difference = torch.where(same, 0.0, mine - reference).abs()
    return float(difference.nan_to_num(nan=math.inf).max()) if ours.numel() else 0.0


def _wide(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor).double() if tensor.is_complex() else tensor.double()
