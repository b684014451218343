"""Memory of a rank: an upper bound that stays close to what is measured.

What a rank holds while a step runs:

* parameters, buffers, constants; gradient buffers; optimizer states;
* per microbatch in flight, what its backward will read (`saved`), each storage once;
* while F, B or W of one microbatch runs, its transients: activations and gradients that live a
  while, results, and gradients that B leaves for W;
* messages: receives posted one action ahead, sends under way (`compiler/ir/messages.py`); the
  whole batch of user inputs;
* when no activation is left: buckets in which gradients are summed, as many as may be under way;
  at the optimizer step, its own temporaries; then buckets that gather updated parameters.

`stage_memory` counts these by liveness of the stage's steps. For planners that do not know the
stages yet there are additive figures per node (`node_memory.py`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence

from ..compiler.ir.buckets import (
    bucket_ends,
    in_flight_bytes,
    sum_bytes,
    sums_in_flight_bytes,
)
from ..compiler.ir.graph import Graph, Mode, ValueKind
from ..compiler.ir.messages import MAX_SENDS_UNDER_WAY
from ..compiler.ir.plan import MemoryPrediction, OptimizerModel, Stage
from .action_memory import memory_of_steps
from .backward import StageSteps
from .buffers import most_under_way
from .memory_tables import MemoryModel, memory_model
from .parameters import ParameterFigures

# a stream of cuBLAS 32 MiB and 1 (Lt) on Hopper, graphs have one; and what graphs and kernels keep
_LIBRARY_BYTES = 2 * (33 << 20) + (1 << 20)
_MARGIN, _MARGIN_BYTES = 0.025, 1024
_CUDA_BLOCK_BYTES = 512  # sizes are rounded up to it

__all__ = ["consuming_stages", "library_bytes", "optimizer_temporaries", "stage_memory"]


def stage_memory(
    graph: Graph | MemoryModel,
    nodes: Iterable[int],
    *,
    in_flight: int,
    optimizer: OptimizerModel,
    mode: Mode | None = None,
    device: int = 0,
    num_microbatches: int = 1,
    batch_fraction: float = 1.0,
    backend: str = "cpu",
    consumers: Mapping[int, int] | None = None,
    recomputed: Collection[int] = (),
    parameters: Mapping[int, ParameterFigures] | None = None,
) -> MemoryPrediction:
    """Upper bound of the memory of a rank that runs the stage made of `nodes`.

    Args:
        graph: the whole captured graph, or `memory_model` of it when many stages are asked for
            (`batch_fraction` and `backend` are then those of the model).
        nodes: node ids of the stage, replicated ones included.
        in_flight: microbatches whose saved tensors are alive at once under the schedule.
        optimizer: states per parameter byte.
        mode: TRAIN or INFER; by default that of the graph.
        device: index stored in the prediction.
        num_microbatches: of a step: user inputs and outputs of all of them are held.
        consumers: value id -> number of other stages that read it (`consuming_stages`); without
            it every sent value is taken to have one.
        recomputed: nodes whose results backward computes again.
        parameters: value id -> figures of trained parameters; by default a gradient is as large as
            its parameter, and states follow from that.
    """
    model = (
        graph
        if isinstance(graph, MemoryModel)
        else memory_model(graph, batch_fraction=batch_fraction, backend=backend)
    )
    chosen = tuple(sorted(nodes))
    given = parameters or {}
    kept = {index: entry.early_bytes for index, entry in given.items() if entry.early_bytes}
    train = (mode or model.graph.mode) is Mode.TRAIN
    trained, held = _parameters(model, chosen, train)
    figures = {
        index: given.get(index) or _plain_figures(size, optimizer)
        for index, size in trained.items()
    }
    parts = _summed_parts(model, chosen, trained, figures)
    steps = model.steps(chosen, consumers, recomputed, kept, parts)
    actions = memory_of_steps(steps, train)
    saved = actions.saved_bytes
    activations = saved * max(in_flight, 1) if train else 0.0
    messages = _messages(
        model, steps, chosen, in_flight=in_flight, num_microbatches=num_microbatches
    )
    if model.backend == "cuda":
        messages += _graph_inputs(model, steps, chosen) * max(in_flight, 1)
    closing = 0.0
    if train:
        own = figures.values()
        updated = [float(entry.updated_bytes) for entry in own]
        here = [float(entry.updated_bytes) for entry in own if not entry.is_offloaded]
        one_sum, sums, gathers = _bucket_bytes(list(trained.values()), list(own))
        closing = max(
            optimizer_temporaries(optimizer, here, model.backend),
            2 * max(updated, default=0.0),  # a gradient's norm is taken on the device
            gathers,
            # buckets travel once the first part of the last weight gradients is done
            one_sum + max(actions.part_bytes[1:2], default=0.0),
            sums + max(actions.part_bytes[2:], default=0.0),
        )
    # scalars and rows of statistics are not modelled one by one
    margin = _MARGIN * (activations + actions.peak_bytes - saved + messages) + _MARGIN_BYTES
    if model.backend == "cuda":
        margin += _rounding(steps.saved.values()) * max(in_flight, 1) if train else 0.0
        margin += _held_rounding(trained, figures, optimizer)
    transient = max(actions.peak_bytes - saved, closing - activations) + margin
    return MemoryPrediction(
        device=device,
        parameters_bytes=math.ceil(sum(trained.values()) + held),
        gradients_bytes=sum(entry.gradient_bytes for entry in figures.values()),
        optimizer_bytes=sum(entry.state_bytes for entry in figures.values()),
        activations_bytes=math.ceil(activations),
        transients_bytes=math.ceil(transient),
        communication_bytes=math.ceil(messages),
        host_bytes=sum(entry.host_bytes for entry in figures.values()),
        library_bytes=library_bytes(model.backend),
    )


def _rounding(sizes: Iterable[float]) -> float:
    """What the CUDA allocator gives tensors of `sizes` beyond what they ask for."""
    return sum(-size % _CUDA_BLOCK_BYTES for size in sizes)


def _held_rounding(
    trained: Mapping[int, float],
    figures: Mapping[int, ParameterFigures],
    optimizer: OptimizerModel,
) -> float:
    """The same of parameters, gradients and as many states as the optimizer keeps."""
    num_states = math.ceil(optimizer.state_bytes_per_parameter_byte)
    states = [
        entry.state_bytes / num_states for entry in figures.values() for _ in range(num_states)
    ]
    gradients = [float(entry.gradient_bytes) for entry in figures.values()]
    return _rounding([*trained.values(), *gradients, *states])


def _graph_inputs(model: MemoryModel, steps: StageSteps, nodes: tuple[int, ...]) -> float:
    """What CUDA graphs of one microbatch keep of what they are given and what they return."""
    crossing = (steps.received, steps.arriving, steps.returned)
    read = {value for node in nodes for value in model.graph.nodes[node].inputs}
    inputs = sum(model.sizes[i] for i in read if model.graph.values[i].kind is ValueKind.INPUT)
    return sum(sum(table.values()) for table in crossing) + steps.sent_bytes + inputs


def library_bytes(backend: str) -> int:
    """What libraries allocate on a device beside a plan's own bytes, however small the plan is.

    It is not held against the memory that a device has for plans: presets and clusters of this
    machine leave room for it, as for segments of which the allocator uses a part.
    """
    return _LIBRARY_BYTES if backend == "cuda" else 0


def consuming_stages(graph: Graph, stages: Iterable[Stage]) -> dict[int, int]:
    """Value id -> number of stages that read it and do not compute it."""
    counts: Counter[int] = Counter()
    for stage in stages:
        nodes = [graph.nodes[node] for node in stage.nodes]
        made = {value for node in nodes for value in node.outputs}
        counts.update({value for node in nodes for value in node.inputs} - made)
    return dict(counts)


def _bucket_bytes(
    held: Sequence[float], figures: Sequence[ParameterFigures]
) -> tuple[float, float, float]:
    """Most bytes of buckets under way at once: of sums that one part of weight gradients starts, of
    all sums of gradients, of gathers of parameters."""
    total = sum(held)
    pairs = list(zip(held, figures, strict=True))
    sums = [(size, entry.scatter_bytes) for size, entry in pairs if entry.scatter_bytes]
    sums += [(entry.reduce_bytes, entry.reduce_bytes) for entry in figures]
    gathers = [(size, entry.gather_bytes) for size, entry in pairs if entry.gather_bytes]
    largest = max([sum_bytes(total), *(size for size, _ in sums)])
    return (
        most_under_way(sums, largest + sum_bytes(total) / 2),  # it may start with a small one
        most_under_way(sums, sums_in_flight_bytes(total)),
        most_under_way(gathers, in_flight_bytes(total)),
    )


def _summed_parts(
    model: MemoryModel,
    nodes: tuple[int, ...],
    trained: Mapping[int, float],
    figures: Mapping[int, ParameterFigures],
) -> list[list[int]]:
    """Parameters by the parts in which the last backward of a stage completes their gradients, as
    the code generator cuts it; those that other stages hold, too, it leaves out, so that its first
    part is no shorter."""
    order: dict[int, None] = {}
    for node in nodes:
        order.update(dict.fromkeys(model.graph.nodes[node].inputs))
    summed = [
        index
        for index in reversed(order)
        if index in trained and (figures[index].scatter_bytes or figures[index].reduce_bytes)
    ]
    parts = bucket_ends(summed, trained.__getitem__, sum_bytes(sum(trained.values())))
    return parts if len(parts) > 1 else []


def _plain_figures(size: float, optimizer: OptimizerModel) -> ParameterFigures:
    whole = math.ceil(size)
    states = math.ceil(size * optimizer.state_bytes_per_parameter_byte)
    return ParameterFigures(whole, states, whole)


def _parameters(
    model: MemoryModel, nodes: tuple[int, ...], train: bool
) -> tuple[dict[int, float], float]:
    """Bytes of each parameter with a gradient, by value id, and of all other held tensors, that
    `nodes` read."""
    read = sorted({value for node in nodes for value in model.graph.nodes[node].inputs})
    trained: dict[int, float] = {}
    held = 0.0
    for index in read:
        value = model.graph.values[index]
        if value.kind is ValueKind.PARAMETER and value.requires_grad and train:
            trained[index] = float(value.type.num_bytes)
        elif value.kind in (ValueKind.PARAMETER, ValueKind.BUFFER, ValueKind.CONSTANT):
            held += value.type.num_bytes
    return trained, held


def _messages(
    model: MemoryModel,
    steps: StageSteps,
    nodes: tuple[int, ...],
    *,
    in_flight: int,
    num_microbatches: int,
) -> float:
    """Receives posted ahead, sends under way, user inputs and outputs of the whole batch.

    A rank does not see at once that a message has left, so it keeps several to each other rank.
    """
    ahead = max(sum(steps.received.values()), sum(steps.arriving.values()))
    held = min(num_microbatches, MAX_SENDS_UNDER_WAY)
    under_way = steps.sent_bytes * max(in_flight - 1, held, 1)
    under_way += sum(steps.returned.values()) * max(held, 1)
    read = {value for node in nodes for value in model.graph.nodes[node].inputs}
    inputs = sum(
        model.sizes[index] * (num_microbatches if value.batch_dim is not None else 1)
        for index in read
        if (value := model.graph.values[index]).kind is ValueKind.INPUT
    )
    outputs = 0.0
    if model.graph.mode is Mode.INFER:
        outputs = 2 * steps.user_outputs_bytes * num_microbatches  # parts, then joined
    return ahead + under_way + inputs + outputs


def optimizer_temporaries(
    optimizer: OptimizerModel, trained: Sequence[float], backend: str
) -> float:
    """Temporaries of the update, and of the gradient norm before it.

    On CUDA torch updates all parameters at once (`foreach`): one temporary as large as all of
    them. On CPU one after the other: twice the largest (AdamW's denominator and a root; the norm
    of a 16-bit gradient takes a copy in float32).
    """
    if not trained:
        return 0.0
    largest = 2 * max(trained)
    if backend == "cpu" or not optimizer.state_bytes_per_parameter_byte:
        return largest
    return max(largest, sum(trained))
