"""A whole model in one piece, and all ranks of it under layouts: losses and gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from cutset.compiler.batch import take_rows
from cutset.compiler.capture import Captured, capture
from cutset.compiler.capture.interpret import run_graph
from cutset.compiler.ir.graph import Graph, Mode, OutputKind, Value, ValueKind
from cutset.compiler.ir.mesh import Mesh
from cutset.compiler.ir.verify import verify_graph
from cutset.compiler.sharding.localize import LocalPart, localize
from cutset.compiler.sharding.sharding import Sharding, make_sharding
from cutset.runtime.rng import make_key
from tests.models.exact import ROWS, SHARDED_MODELS, ExactModel

from .choices import Layouts
from .lockstep import RankGraph, assemble, coordinates, run_lockstep

__all__ = ["Whole", "check_layouts", "whole", "whole_of"]


@dataclass(frozen=True, slots=True)
class Whole:
    """A captured model in float64, its tensors, loss and gradients."""

    graph: Graph
    tensors: Mapping[int, Tensor]
    loss: Tensor
    gradients: Mapping[int, Tensor]


@functools.cache
def whole(name: str) -> Whole:
    """Of one of `SHARDED_MODELS`."""
    return whole_of(SHARDED_MODELS[name])


def whole_of(make: Callable[[], ExactModel]) -> Whole:
    torch.manual_seed(0)
    made = make()
    model = made.model.double().train()
    args, kwargs = torch.utils._pytree.tree_map_only(
        Tensor, lambda t: t.double() if t.is_floating_point() else t, (made.args, made.kwargs)
    )
    args, kwargs = take_rows((args, kwargs), ROWS)
    captured: Captured = capture(model, args, kwargs, mode=Mode.TRAIN, loss_fn=made.loss_fn)
    graph = captured.graph
    by_origin = {**captured.tensors, **captured.inputs.bind(args, kwargs)}
    tensors = {
        value.id: by_origin[value.origin].detach()
        for value in graph.values
        if value.kind is not ValueKind.RESULT
    }
    leaves = _leaves(graph, tensors)
    named = {graph.values[number].name: tensor for number, tensor in leaves.items()}
    results = run_graph(graph, named, key=make_key(1, 0, 0))
    loss = _loss(graph, results)
    loss.backward()
    gradients = {n: t.grad for n, t in leaves.items() if t.grad is not None}
    return Whole(graph, tensors, loss.detach(), gradients)


def _leaves(graph: Graph, tensors: Mapping[int, Tensor]) -> dict[int, Tensor]:
    return {
        number: tensor.clone().requires_grad_(_trained(graph.values[number]))
        for number, tensor in tensors.items()
    }


def _trained(value: Value) -> bool:
    return value.kind is ValueKind.PARAMETER and value.requires_grad


def _loss(graph: Graph, results: tuple[Tensor, ...]) -> Tensor:
    kinds = [output.kind for output in graph.outputs]
    return results[kinds.index(OutputKind.LOSS)]


def check_layouts(subject: Whole, mesh: Mesh, layouts: Layouts, tolerance: float) -> None:
    """Loss and gradients of all ranks under `layouts` are those of the whole model."""
    graph = subject.graph
    sharding = make_sharding(graph, mesh, layouts.nodes, layouts.values, layouts.parameters)
    parts = [localize(graph, sharding, place) for place in coordinates(mesh)]
    for part in parts:
        verify_graph(part.graph)
    held = [_local_tensors(subject, part) for part in parts]
    known = run_lockstep(
        [RankGraph(part.graph.values, part.graph.nodes) for part in parts],
        held,
        mesh,
        key=make_key(1, 0, 0),
    )
    losses = [
        mine[part.graph.outputs_of(OutputKind.LOSS)[0].value]
        for part, mine in zip(parts, known, strict=True)
    ]
    for loss in losses:
        torch.testing.assert_close(loss.detach(), subject.loss, rtol=tolerance, atol=0.0)
    torch.autograd.backward(losses, [torch.ones_like(loss) for loss in losses])
    _check_gradients(subject, sharding, parts, held, tolerance)


def _local_tensors(subject: Whole, part: LocalPart) -> dict[int, Tensor]:
    """What one rank holds, by the ids of its graph."""
    shards = {shard.name: shard for shard in part.shards}
    whole_ids = {value.name: value.id for value in subject.graph.values}
    found = {}
    for value in part.graph.values:
        if value.kind is ValueKind.RESULT:
            continue
        tensor = subject.tensors[whole_ids[value.name]]
        shard = shards.get(value.origin)
        if shard is not None:
            for dim, (begin, size) in enumerate(zip(shard.offset, shard.part.shape, strict=True)):
                tensor = tensor.narrow(dim, begin, size)
        found[value.id] = tensor
    return _leaves(part.graph, found)


def _check_gradients(
    subject: Whole,
    sharding: Sharding,
    parts: list[LocalPart],
    held: list[dict[int, Tensor]],
    tolerance: float,
) -> None:
    scale = max(float(g.abs().max()) for g in subject.gradients.values())
    for value in subject.graph.values_of(ValueKind.PARAMETER):
        if value.id not in subject.gradients:
            continue
        layout = sharding.gradient_layout(value)
        mine = []
        for part, tensors in zip(parts, held, strict=True):
            leaf = tensors[part.graph.by_name()[value.name].id]
            mine.append(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad)
        found = assemble(mine, layout, sharding.mesh)
        expected = subject.gradients[value.id]
        floor = max(float(expected.abs().max()), 0.01 * scale)
        error = float((found - expected).abs().max()) / floor
        assert error <= tolerance, f"gradient of {value.origin} held {layout}: off by {error:.2e}"
