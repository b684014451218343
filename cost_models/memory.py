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

`stage_memory` counts these by liveness of the stage's steps. `memory_profile` gives additive
figures per node for a planner that does not know the stages yet:

    stage peak <= static + in_flight * (sum saved + received) + sum deferred + max transient

where `received` are bytes of boundary values read.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..compiler.ir.buckets import (
    bucket_ends,
    in_flight_bytes,
    sum_bytes,
    sums_in_flight_bytes,
)
from ..compiler.ir.graph import Graph, Mode, ValueKind
from ..compiler.ir.memo import once_per_object
from ..compiler.ir.messages import MAX_SENDS_UNDER_WAY
from ..compiler.ir.plan import MemoryPrediction, OptimizerModel, Stage
from .adjoint_types import Adjoint, NodeContext
from .adjoints import adjoint
from .analysis import Storages, batch_values, find_storages, weight_like_values
from .backward import StageSteps, stage_steps
from .buffers import most_under_way
from .liveness import live_bytes
from .parameters import ParameterFigures
from .recompute import nodes_with_inputs

_CUBLAS_BYTES = 2 * 2**25  # torch gives it 32 MiB a stream on Hopper; graphs have a stream
_MARGIN, _MARGIN_BYTES = 0.025, 1024
_CUDA_BLOCK_BYTES = 512  # sizes are rounded up to it

__all__ = [
    "ActionMemory",
    "MemoryModel",
    "NodeMemory",
    "action_memory",
    "consuming_stages",
    "library_bytes",
    "memory_model",
    "memory_profile",
    "node_memory",
    "optimizer_temporaries",
    "rerun_nodes",
    "stage_memory",
]


@dataclass(frozen=True, slots=True)
class NodeMemory:
    """Additive memory figures of one node, one microbatch; see the module docstring.

    Args:
        saved_bytes: storages made by this node that some backward reads.
        transient_bytes: what else is live while the node or its backward runs.
        deferred_bytes: gradients that wait for its weight gradient, from B to W.
    """

    saved_bytes: int
    transient_bytes: int
    deferred_bytes: int


@dataclass(frozen=True, slots=True)
class PartMemory:
    """A part of the weight gradients: its peak above what was kept before it, and what is kept
    after it, in bytes."""

    peak_bytes: float
    left_bytes: float


@dataclass(frozen=True, slots=True)
class ActionMemory:
    """Memory of one stage's actions on one microbatch, in bytes.

    Args:
        received_bytes: boundary values, which are among the forward's.
        saved_bytes: kept from the end of the forward to the backward.
        left_bytes: kept between input gradients and weight gradients.
        forward_bytes: peak of the forward, what it saves included.
        backward_input_bytes: peak of the input gradients above `saved_bytes`.
        weight_parts: the weight gradients, which may be computed in parts.
    """

    received_bytes: float
    saved_bytes: float
    left_bytes: float
    forward_bytes: float
    backward_input_bytes: float
    weight_parts: tuple[PartMemory, ...]

    @property
    def part_bytes(self) -> tuple[float, ...]:
        """The most that is live in each part of the weight gradients."""
        before = (self.left_bytes, *(part.left_bytes for part in self.weight_parts))
        pairs = zip(before, self.weight_parts, strict=False)
        return tuple(kept + part.peak_bytes for kept, part in pairs)

    @property
    def backward_weight_bytes(self) -> float:
        """Peak of the weight gradients above `left_bytes`."""
        return max(self.part_bytes, default=0.0) - self.left_bytes

    @property
    def peak_bytes(self) -> float:
        """Most that is live, what is saved of this microbatch included."""
        return max(
            self.forward_bytes,
            self.saved_bytes + self.backward_input_bytes,
            self.left_bytes + self.backward_weight_bytes,
        )

    @property
    def backward_bytes(self) -> float:
        """Peak of the whole backward above `saved_bytes`."""
        later = self.left_bytes + self.backward_weight_bytes - self.saved_bytes
        return max(self.backward_input_bytes, later)


@dataclass(frozen=True, slots=True)
class MemoryModel:
    """What memory prediction derives once from a graph; make it with `memory_model`."""

    graph: Graph
    backend: str
    sizes: tuple[float, ...]
    storages: Storages
    adjoints: tuple[Adjoint, ...]
    weights: frozenset[int]

    def steps(
        self,
        nodes: Iterable[int],
        consumers: Mapping[int, int] | None = None,
        recomputed: Collection[int] = (),
        kept: Mapping[int, float] | None = None,
        parts: Sequence[Collection[int]] = (),
    ) -> StageSteps:
        """Kernels of the stage made of `nodes`; other arguments as in `stage_steps`.

        A boundary value arrives contiguous; where it is not so in the whole graph, copies differ,
        and the stage's storages and rules are derived anew.
        """
        chosen = tuple(sorted(nodes))
        storages, adjoints = self.storages, self.adjoints
        if self._arrives_otherwise(chosen):
            storages = find_storages(self.graph, chosen)
            own = {node: self._adjoint(node, storages) for node in chosen}
            adjoints = tuple(own.get(node.id, Adjoint()) for node in self.graph.nodes)
        return stage_steps(
            self.graph,
            chosen,
            adjoints=adjoints,
            storages=storages,
            sizes=self.sizes,
            consumers=consumers,
            recomputed=recomputed,
            kept=kept,
            parts=parts,
        )

    def _arrives_otherwise(self, nodes: tuple[int, ...]) -> bool:
        made = {value for node in nodes for value in self.graph.nodes[node].outputs}
        read = {value for node in nodes for value in self.graph.nodes[node].inputs}
        return any(
            not self.storages.stands_contiguous(self.graph.values[value]) for value in read - made
        )

    def _adjoint(self, node: int, storages: Storages) -> Adjoint:
        context = NodeContext(
            self.graph, self.graph.nodes[node], storages, self.sizes, self.backend
        )
        return adjoint(context)


def memory_model(graph: Graph, *, batch_fraction: float = 1.0, backend: str = "cpu") -> MemoryModel:
    """Prepare memory prediction of `graph`.

    Args:
        batch_fraction: predict for this multiple of the microbatch it was captured at.
        backend: torch device type that runs it; kernels differ in what they save.
    """
    return MemoryModel(graph, backend, *_memory_tables(graph, batch_fraction, backend))


@once_per_object
def _memory_tables(
    graph: Graph, batch_fraction: float, backend: str
) -> tuple[tuple[float, ...], Storages, tuple[Adjoint, ...], frozenset[int]]:
    """The other fields of `MemoryModel`; they do not hold the graph, which would never die."""
    batched = batch_values(graph)
    sizes = tuple(
        value.type.num_bytes * (batch_fraction if value.id in batched else 1.0)
        for value in graph.values
    )
    storages = find_storages(graph)
    adjoints = tuple(
        adjoint(NodeContext(graph, node, storages, sizes, backend)) for node in graph.nodes
    )
    return sizes, storages, adjoints, weight_like_values(graph)


def rerun_nodes(graph: Graph, recomputed: Collection[int]) -> frozenset[int]:
    """Those of `recomputed` whose results backward really needs again."""
    return _rerun_nodes(graph, frozenset(recomputed)) if recomputed else frozenset()


@once_per_object
def _rerun_nodes(graph: Graph, recomputed: frozenset[int]) -> frozenset[int]:
    model = memory_model(graph)
    return model.steps(range(len(graph.nodes)), recomputed=recomputed).rerun


def memory_profile(
    graph: Graph,
    *,
    batch_fraction: float = 1.0,
    backend: str = "cpu",
    recomputed: Collection[int] = (),
) -> tuple[NodeMemory, ...]:
    """Additive memory figures of every node of `graph`, in node order.

    Args:
        recomputed: nodes whose results backward computes again.
    """
    return _memory_profile(graph, batch_fraction, backend, frozenset(recomputed))


@once_per_object
def _memory_profile(
    graph: Graph, batch_fraction: float, backend: str, recomputed: frozenset[int]
) -> tuple[NodeMemory, ...]:
    model = memory_model(graph, batch_fraction=batch_fraction, backend=backend)
    return node_memory(model, model.steps(range(len(graph.nodes)), recomputed=recomputed))


def node_memory(model: MemoryModel, steps: StageSteps) -> tuple[NodeMemory, ...]:
    """`memory_profile` from the steps of all nodes of the model's graph."""
    graph = model.graph
    maker = {storage: step.node for step in steps.forward for storage, _ in step.writes}
    saved = [0.0] * len(graph.nodes)
    for storage, size in steps.saved.items():
        if storage in maker:
            saved[maker[storage]] += size
    deferred = _deferred(model, steps)
    transient = _transients(steps, len(graph.nodes))
    return tuple(
        NodeMemory(math.ceil(saved[i]), math.ceil(transient[i]), math.ceil(deferred[i]))
        for i in range(len(graph.nodes))
    )


def _deferred(model: MemoryModel, steps: StageSteps) -> list[float]:
    """Per node, arriving gradients that its weight gradient reads (less what B has freed)."""
    table = [0.0] * len(model.graph.nodes)
    backward = (*steps.backward_input, *steps.backward_weight)
    gradients = {
        storage: size
        for step in backward
        for storage, size in step.writes
        if storage not in steps.copies and storage not in steps.under_way
    }
    joined = nodes_with_inputs(backward, steps.copies)
    readers: set[tuple[int, int]] = set()
    for step in backward:
        if not _is_weight_step(model, step.node) or step.node in joined:
            continue
        for storage in step.reads:
            if storage in gradients and (step.node, storage) not in readers:
                readers.add((step.node, storage))
                table[step.node] += gradients[storage]
    return table


def _is_weight_step(model: MemoryModel, node: int) -> bool:
    return any(index in model.weights for index in model.graph.nodes[node].inputs)


def _transients(steps: StageSteps, count: int) -> list[float]:
    """Per node, live bytes beside saved ones while its forward or backward runs."""
    table = [0.0] * count
    forward = live_bytes(steps.forward, steps.received, steps.outputs | set(steps.saved))
    saved_so_far = 0.0
    for step, live in zip(steps.forward, forward.at_step, strict=True):
        saved_so_far += sum(steps.saved[s] for s, _ in step.writes if s in steps.saved)
        table[step.node] = max(table[step.node], live - saved_so_far)
    backward = (*steps.backward_input, *steps.backward_weight)
    gradients = live_bytes(backward, steps.arriving, set(steps.returned))
    for step, live in zip(backward, gradients.at_step, strict=True):
        table[step.node] = max(table[step.node], live)
    return table


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
    actions = _action_memory(steps, train)
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
    return _CUBLAS_BYTES if backend == "cuda" else 0


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


def action_memory(
    model: MemoryModel,
    nodes: Iterable[int] | None,
    recomputed: Collection[int] = (),
    kept: Mapping[int, float] | None = None,
    parts: Sequence[Collection[int]] = (),
) -> ActionMemory:
    """Memory of each action of the stage made of `nodes` (None: all nodes of the graph).

    Args:
        recomputed: nodes whose results backward computes again.
        kept: parameters of which backward sums the gradient, and bytes of the buffers for that.
        parts: parameters whose gradients each part of the weight gradients completes.
    """
    chosen = range(len(model.graph.nodes)) if nodes is None else nodes
    steps = model.steps(chosen, recomputed=recomputed, kept=kept, parts=parts)
    return _action_memory(steps, model.graph.mode is Mode.TRAIN)


def _action_memory(steps: StageSteps, train: bool) -> ActionMemory:
    received = set(steps.received)
    keep = steps.outputs | received | (set(steps.saved) if train else set())
    forward = live_bytes(steps.forward, steps.received, keep)
    if not train:
        return ActionMemory(sum(steps.received.values()), 0.0, 0.0, forward.peak_bytes, 0.0, ())
    saved = sum(steps.saved.values())
    start = {**steps.saved, **steps.arriving}
    later = {storage for step in steps.backward_weight for storage in step.reads}
    keep_b = (later & {*start, *steps.passed}) | set(steps.arriving) | set(steps.returned)
    first = live_bytes(steps.backward_input, start, keep_b)
    left = {storage: size for storage, size in first.end.items() if storage in later}
    return ActionMemory(
        received_bytes=sum(steps.received.values()),
        saved_bytes=saved,
        left_bytes=sum(left.values()),
        forward_bytes=forward.peak_bytes,
        backward_input_bytes=first.peak_bytes - saved,
        weight_parts=tuple(_part_memory(steps, left)),
    )


def _part_memory(steps: StageSteps, left: Mapping[int, float]) -> Iterator[PartMemory]:
    """`left`: what B leaves."""
    live = dict(left)
    for number, part in enumerate(steps.weight_parts):
        rest = steps.weight_parts[number + 1 :]
        later = {storage for steps in rest for step in steps for storage in step.reads}
        found = live_bytes(part, live, later)
        kept = {storage: size for storage, size in found.end.items() if storage in later}
        yield PartMemory(found.peak_bytes - sum(live.values()), sum(kept.values()))
        live = kept


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
