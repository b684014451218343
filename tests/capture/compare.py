"""Eager model against captured graph, computed without capture's own self-check."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor

from cutset.compiler.capture import Captured
from cutset.compiler.capture.interpret import run_graph
from cutset.compiler.ir.graph import OutputKind, ValueKind
from cutset.compiler.reference import WorstError, relative_error
from cutset.runtime.rng import ReplayRandomness, make_key
from tests.models.example import Example

__all__ = ["graph_results", "model_results", "worst_error"]

KEY = make_key(7, 3, 1)


def model_results(example: Example, key: Tensor = KEY) -> dict[str, dict[str, Tensor]]:
    """Loss, gradients and buffers of one training step of a copy of the model, run eagerly."""
    model = copy.deepcopy(example.model)
    with ReplayRandomness(key):
        result = model(*example.args, **example.kwargs)
        loss = result.loss if example.loss_fn is None else example.loss_fn(result)
        loss.backward()
    return {
        "loss": {"loss": loss.detach()},
        "gradients": {
            name: parameter.grad
            for name, parameter in model.named_parameters()
            if parameter.grad is not None
        },
        "buffers": dict(model.named_buffers()),
    }


def graph_results(
    captured: Captured, example: Example, key: Tensor = KEY
) -> dict[str, dict[str, Tensor]]:
    """The same of the captured graph, by plain autograd."""
    graph = captured.graph
    trained = [value for value in graph.values_of(ValueKind.PARAMETER) if value.requires_grad]
    leaves = {value.origin: _leaf(captured.tensors[value.origin]) for value in trained}
    given: dict[str, Any] = {**captured.tensors, **leaves}
    given |= captured.inputs.bind(example.args, example.kwargs)
    results = run_graph(graph, given, key=key)
    found: dict[str, dict[str, Tensor]] = {"gradients": {}, "buffers": {}}
    for output, value in zip(graph.outputs, results, strict=True):
        if output.kind is OutputKind.LOSS:
            found["loss"] = {"loss": value.detach()}
            value.backward()
        elif output.kind is OutputKind.BUFFER:
            found["buffers"][output.target] = value.detach()
    found["gradients"] = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    unchanged = dict(example.model.named_buffers())
    found["buffers"] = unchanged | found["buffers"]
    return found


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_()


def worst_error(captured: Captured, example: Example) -> WorstError:
    """The largest relative error of any kind of result, and the tensor that has it."""
    ours, theirs = graph_results(captured, example), model_results(example)
    errors = [relative_error(ours[kind], theirs[kind]) for kind in theirs]
    return max(errors, key=lambda error: error.value)
