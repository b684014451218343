"""From an unmodified module to an exported program of functional ATen ops.

`torch.export` (non-strict) runs the model's Python once on fake tensors. A wrapper takes the tensor
leaves of the call one by one, rebuilds the call, runs the model under a watch for whatever export
would drop in silence, and picks the loss. Regions without gradients are marked by `detach` before
`run_decompositions({})` makes the graph functional. Where export refuses, the model is traced
symbolically first and the trace exported.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..ir.errors import CaptureError, CutsetError
from ..ir.graph import Mode
from .buffers import replacements_as_changes
from .flatten import flatten
from .functions import as_operators, python_functions, refuse_functions, refuse_nonlinear
from .gradients import Watch
from .lines import Lines
from .locate import explain_broken_call, explain_failure
from .regions import detach_no_grad_regions
from .signature import InputSignature, LossFunction, OutputSignature, find_loss
from .state import same_contents, unchanged
from .symbolic import trace_symbolically

__all__ = ["MODEL_PREFIX", "Exported", "call_model", "export_model", "mode_of"]

MODEL_PREFIX = "model"


@dataclass(frozen=True, slots=True)
class Exported:
    """A functional program and its signature.

    Args:
        graph: functional ATen calls; its outputs are the loss, if the mode is TRAIN, then USER
            outputs, except for those that `signature` marks as new contents of buffers.
        signature: what every placeholder and output of `graph` is.
        tensors: state of the program: lifted constants, parameters and buffers by target.
        outputs: what the model returns.
        changed: attributes of modules that the forward pass sets to tensors.
    """

    graph: fx.Graph
    signature: torch.export.ExportGraphSignature
    tensors: Mapping[str, Tensor]
    outputs: OutputSignature
    changed: tuple[str, ...]


def call_model(
    model: Callable[..., Any],
    inputs: InputSignature,
    tensors: list[Tensor],
    *,
    mode: Mode,
    loss_fn: LossFunction | None,
) -> tuple[Tensor | None, Any]:
    """`(loss, result)` of the model on the tensors of a call; the loss is None in INFER mode."""
    args, kwargs, targets = inputs.unflatten(tensors)
    result = model(*args, **kwargs)
    if mode is Mode.INFER:
        return None, result
    loss: object = find_loss(result) if loss_fn is None else loss_fn(result, *targets)
    if not (isinstance(loss, Tensor) and loss.ndim == 0 and loss.is_floating_point()):
        raise CaptureError(
            "the loss function does not return a scalar float tensor",
            where="loss_fn",
            ways_out=("reduce it by mean() or sum()",),
        )
    if not loss.requires_grad:
        raise CaptureError(
            "the loss does not depend on any parameter that requires a gradient",
            where="the model's loss",
            ways_out=("set requires_grad on the parameters to train", "capture for inference"),
        )
    return loss, result


@dataclass(slots=True)
class _Trace:
    """What the wrapper is told and what it learns; opaque to `nn.Module`."""

    inputs: InputSignature
    mode: Mode
    loss_fn: LossFunction | None
    keep_outputs: bool
    outputs: OutputSignature | None = None


class _Call(nn.Module):
    """The model as a function of the tensor leaves of a call."""

    def __init__(self, model: nn.Module, trace: _Trace) -> None:
        super().__init__()
        self.add_module(MODEL_PREFIX, model)
        self._trace = trace

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        trace, model = self._trace, self.get_submodule(MODEL_PREFIX)
        with Lines(), Watch(model), replacements_as_changes(model):
            loss, result = call_model(
                model, trace.inputs, list(tensors), mode=trace.mode, loss_fn=trace.loss_fn
            )
        trace.outputs, found = OutputSignature.of(result, trace.inputs.rows)
        if loss is None:
            return tuple(found)
        kept = found if trace.keep_outputs else []
        functions = python_functions([loss, *kept])
        if functions:
            raise _OwnFunctions(functions)
        return (loss, *kept)


class _OwnFunctions(CutsetError):
    """The traced model uses these `autograd.Function`s."""

    def __init__(self, functions: tuple[type, ...]) -> None:
        self.functions = functions
        super().__init__(f"autograd functions: {functions}")


@contextlib.contextmanager
def mode_of(model: nn.Module, mode: Mode) -> Iterator[None]:
    """The model as `mode` runs it: as it is to train; evaluating, without gradients, to infer."""
    if mode is Mode.TRAIN:
        with torch.enable_grad():
            yield
        return
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in flags:
            module.training = training


def export_model(
    model: nn.Module,
    inputs: InputSignature,
    tensors: list[Tensor],
    *,
    mode: Mode,
    loss_fn: LossFunction | None = None,
    keep_outputs: bool = True,
) -> Exported:
    """Export `model`, called as `inputs` says, to functional ATen ops.

    Args:
        tensors: example tensors, on the device of the model.
        keep_outputs: in TRAIN mode, return the model's outputs besides the loss.

    Raises:
        CaptureError: neither export nor symbolic tracing gets through, or what they would
            return computes other gradients than the model.
    """
    trace = _Trace(inputs, mode, loss_fn, keep_outputs)
    with mode_of(model, mode), unchanged(model) as changed, _quiet():
        program, functions = _export_functions(model, trace, tensors)
        if mode is Mode.TRAIN:
            signature = program.graph_signature
            own = {*signature.inputs_to_buffers, *signature.inputs_to_parameters}
            detach_no_grad_regions(program.graph_module, frozenset(own))
        graph = flatten(program.graph_module)
        if graph is None:
            program = program.run_decompositions({})
            graph = program.graph
        if functions:
            refuse_nonlinear(graph, functions)
    assert trace.outputs is not None
    state = {**program.state_dict, **program.constants}
    return Exported(graph, program.graph_signature, state, trace.outputs, tuple(changed))


def _export_functions(
    model: nn.Module, trace: _Trace, tensors: list[Tensor]
) -> tuple[torch.export.ExportedProgram, tuple[type, ...]]:
    """The program, and the `autograd.Function`s that it has as operators."""
    try:
        return _export_either_way(model, trace, tensors), ()
    except _OwnFunctions as found:
        functions = found.functions
    if any(function.__module__.startswith("torch.") for function in functions):
        raise refuse_functions(functions)
    try:
        with as_operators(functions):
            return _export_either_way(model, trace, tensors), functions
    except _OwnFunctions as found:
        raise refuse_functions(found.functions) from None


def _export_either_way(
    model: nn.Module, trace: _Trace, tensors: list[Tensor]
) -> torch.export.ExportedProgram:
    try:
        return _export(model, trace, tensors)
    except CutsetError:
        raise
    except Exception as error:
        return _export_traced(model, trace, tensors, error)


def _export(model: nn.Module, trace: _Trace, tensors: list[Tensor]) -> torch.export.ExportedProgram:
    return torch.export.export(_Call(model, trace), tuple(tensors), strict=False)


def _export_traced(
    model: nn.Module, trace: _Trace, tensors: list[Tensor], refusal: Exception
) -> torch.export.ExportedProgram:
    """The fallback. Raises CaptureError about `refusal` when it fails as well."""
    try:
        traced = trace_symbolically(model, *trace.inputs.unflatten(tensors)[:2])
        return _export(traced, trace, tensors)
    except CutsetError:
        raise
    except Exception as error:
        _refuse_broken_calls(model, trace, tensors)
        raise explain_failure(model, refusal, error) from refusal


def _refuse_broken_calls(model: nn.Module, trace: _Trace, tensors: list[Tensor]) -> None:
    """Raise CaptureError if the model fails on the example inputs without being traced as well."""
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), same_contents(model):
            args, kwargs, _ = trace.inputs.unflatten(tensors)
            model(*args, **kwargs)
    except Exception as error:
        raise explain_broken_call(model, error) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the tracer prints and warns of, which is about its own insides."""
    unread = io.StringIO()
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(unread),
        contextlib.redirect_stderr(unread),
    ):
        warnings.simplefilter("ignore")
        yield
