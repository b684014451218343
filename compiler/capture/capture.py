"""One call from an unmodified module to a `Captured` graph with the tensors it reads."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..ir.errors import UsageError
from ..ir.graph import Graph, Mode
from .check import check_against_model
from .export import export_model
from .gradients import refuse_hooks
from .lines import lean_traces
from .lower import lower
from .masks import simplify_masks
from .quiet import without_trace_log
from .rows import keep_rows
from .signature import InputSignature, LossFunction, OutputSignature, num_targets
from .state import all_on_meta, numbers_kept

__all__ = ["Captured", "capture"]


@dataclass(frozen=True, slots=True)
class Captured:
    """A captured model.

    Args:
        graph: its forward graph.
        tensors: parameters, buffers and constants that the graph reads, by `Value.origin`; the
            model's own tensors, on the meta device if the model is there.
        inputs: how a call maps to the graph's inputs (`captured.inputs.bind(args, kwargs)`).
        outputs: how USER outputs unflatten to what the model returns.
        num_draws: how many ordinals of random draws a forward pass uses up.
        warnings: what the user should know, one sentence each.
    """

    graph: Graph
    tensors: Mapping[str, Tensor]
    inputs: InputSignature
    outputs: OutputSignature
    num_draws: int
    warnings: tuple[str, ...] = ()


def capture(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    mode: Mode,
    loss_fn: LossFunction | None = None,
    check: bool = True,
    keep_outputs: bool = False,
) -> Captured:
    """Capture `model` as called with these example inputs, of the size of one microbatch.

    Args:
        model: stays as it is; on the meta device its tensors are not touched at all.
        args, kwargs: example inputs; with a loss function of k + 1 required arguments the last k
            positional ones are its targets.
        mode: TRAIN captures the loss in the model's current train / eval state; INFER the
            outputs, evaluating and without gradients.
        loss_fn: None if the model returns its loss.
        check: unless the model is on the meta device, run model and graph once on the example
            inputs and compare results and all gradients.
        keep_outputs: in TRAIN mode keep USER outputs besides the loss.

    Raises:
        UsageError: there are no example inputs, or fewer than the loss function needs.
        CaptureError: the model cannot be captured, or the graph's gradients would be wrong.
    """
    kwargs = dict(kwargs or {})
    if not args and not kwargs:
        raise UsageError(
            "there are no example inputs to capture the model with",
            where=type(model).__name__,
            ways_out=("pass example_inputs, a tuple of what the model is called with",),
        )
    targets = num_targets(loss_fn)
    inputs, tensors = InputSignature.of(args, kwargs, targets)
    tensors = _distinct(tensors)
    if mode is Mode.TRAIN:
        refuse_hooks(model)
    is_meta = any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    if is_meta:
        tensors = [tensor.to("meta") for tensor in tensors]
    name = type(model).__name__
    with contextlib.ExitStack() as stack:
        stack.enter_context(without_trace_log())
        stack.enter_context(lean_traces())
        if is_meta:
            stack.enter_context(all_on_meta(model))
            stack.enter_context(numbers_kept())
        exported = export_model(
            model, inputs, tensors, mode=mode, loss_fn=loss_fn, keep_outputs=keep_outputs
        )
        lowered = lower(exported, model, inputs, mode=mode, name=name)
    captured = Captured(
        graph=keep_rows(simplify_masks(lowered.graph)),
        tensors=lowered.tensors,
        inputs=inputs,
        outputs=exported.outputs,
        num_draws=lowered.num_draws,
        warnings=(*map(_not_returned, exported.outputs.dropped), *map(_not_kept, exported.changed)),
    )
    if check and not is_meta:
        check_against_model(captured, model, tensors, loss_fn=loss_fn)
    return captured


def _not_returned(what: str) -> str:
    return f"{what} cannot be returned and is None instead"


def _not_kept(attribute: str) -> str:
    return f"the forward pass sets the attribute {attribute}, which a partitioned run does not keep"


def _distinct(tensors: list[Tensor]) -> list[Tensor]:
    """The tensors, each an object of its own.

    Export takes two inputs that are one object (`ids` given as `labels` too) for one input, and
    would read either where the model reads the other.
    """
    seen: set[int] = set()
    distinct = []
    for tensor in tensors:
        distinct.append(tensor.clone() if id(tensor) in seen else tensor)
        seen.add(id(tensor))
    return distinct
