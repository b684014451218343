"""Run a graph on tensors with plain autograd: the oracle of capture's self-check and of tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ...runtime.rng import random_op
from ..ir.errors import UsageError
from ..ir.graph import Attribute, Graph, Node, Operand, Value, ValueKind
from ..ir.ops import op_named, resolve, robust

__all__ = ["execute_node", "run_graph"]


def run_graph(
    graph: Graph,
    tensors: Mapping[str, Tensor],
    *,
    key: Tensor | None = None,
    device: torch.device | None = None,
    observe: Callable[[Value, Tensor], None] | None = None,
) -> tuple[Tensor, ...]:
    """The graph's outputs, in order. Autograd records as it would for the model.

    Args:
        tensors: what the graph does not compute, by value name or by origin.
        key: of the random streams, from `make_key`; needed if the graph draws.
        device: stands in for every device in the graph; by default that of the first tensor.
        observe: sees every value as it is computed.

    Raises:
        UsageError: a tensor or the key is missing.
    """
    values: dict[int, Tensor] = {}
    for value in graph.values:
        if value.kind is ValueKind.RESULT:
            continue
        tensor = tensors.get(value.name, tensors.get(value.origin))
        if tensor is None:
            raise UsageError(f"no tensor for {value.kind.value} {value.origin or value.name}")
        values[value.id] = tensor
    if device is None:
        device = next((tensor.device for tensor in values.values()), torch.device("cpu"))
    last = {value: node.id for node in graph.nodes for value in node.inputs}
    last.update({output.value: len(graph.nodes) for output in graph.outputs})
    for node in graph.nodes:
        inputs = [values[value] for value in node.inputs]
        computed = execute_node(node, inputs, key, device)
        for number, tensor in zip(node.outputs, computed, strict=True):
            values[number] = tensor
            if observe is not None:
                observe(graph.values[number], tensor)
        for used in {*node.inputs, *node.outputs}:
            if last.get(used, node.id) == node.id:
                del values[used]
    return tuple(values[output.value] for output in graph.outputs)


def execute_node(
    node: Node, inputs: list[Tensor], key: Tensor | None, device: torch.device
) -> list[Tensor]:
    """Results of one node on its input tensors, without those that are no tensors."""

    def fill(item: Attribute) -> Any:
        if isinstance(item, Operand):
            return inputs[item.index]
        if isinstance(item, tuple):
            return [fill(entry) for entry in item]
        return device if isinstance(item, torch.device) else item

    args = [fill(item) for item in node.args]
    kwargs = {name: fill(item) for name, item in node.kwargs}
    if node.random_draw is None:
        result = resolve(op_named(robust(node.op.name)))(*args, **kwargs)
    elif key is None:
        raise UsageError(f"the graph draws random numbers (node {node.name}) and needs a key")
    else:
        result = random_op(node.op.name)(key, node.random_draw, *args, **kwargs)
    if isinstance(result, Tensor):
        return [result]
    return [item for item in result if isinstance(item, Tensor)]
