"""What a trained parameter takes on one rank: bytes of gradient and states, seconds of sums.

Under a layout of each (`ParameterLayout`), on an axis over which gradients are terms of a sum:

* states whole: one all-reduce a step, which backward hides in part (`overlap.py`);
* states in parts (ZeRO-1): a reduce-scatter of gradients and an all-gather of parameters a step;
* gradients in parts (ZeRO-2): a reduce-scatter a microbatch, an all-gather a step.

Parameters held in parts (ZeRO-3) are gathered by nodes of the local graph, which are priced there.
Sums travel in buckets, so latency is counted once a bucket and not once a parameter. (Rajbhandari
et al., ZeRO, 2020.) A bucket is full at most, so that parameters that share its latency by their
bytes bear no more than there is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..compiler.ir.buckets import sum_bytes
from ..compiler.ir.graph import Graph, ValueKind
from ..compiler.ir.mesh import Layout, Mesh, Partial, Shard, local_type
from ..compiler.ir.plan import OptimizerModel, ParameterLayout
from ..compiler.ir.types import TensorType
from .buffers import bucket_gather_bytes, bucket_scatter_bytes, scatter_bytes
from .collectives import Network

__all__ = ["ParameterFigures", "parameter_figures", "stage_bucket_bytes"]


@dataclass(frozen=True, slots=True)
class ParameterFigures:
    """One trained parameter on one rank.

    Args:
        gradient_bytes: of its accumulated gradient.
        state_bytes: of the optimizer's states.
        updated_bytes: of the part that the rank updates.
        host_bytes: of what lies on the host, if states do: they, weights and gradients.
        sum_seconds: of summing gradients once a step, beside the last backward.
        step_seconds: of gathering parameters, once a step; on CPUs also what sums and gathers take
            of the thread that computes.
        microbatch_seconds: of summing gradients, once a microbatch.
        handling_seconds: what these sums take of computation on CPUs, likewise.
        early_bytes: of buffers in which backward sums the gradient, once a microbatch.
        scatter_bytes, reduce_bytes, gather_bytes: of its share of the buckets that sum gradients
            and gather parameters once a step, by kind.
    """

    gradient_bytes: int
    state_bytes: int
    updated_bytes: int
    sum_seconds: float = 0.0
    step_seconds: float = 0.0
    microbatch_seconds: float = 0.0
    handling_seconds: float = 0.0
    early_bytes: float = 0.0
    scatter_bytes: float = 0.0
    reduce_bytes: float = 0.0
    gather_bytes: float = 0.0
    host_bytes: int = 0

    @property
    def is_offloaded(self) -> bool:
        return self.host_bytes > 0


def stage_bucket_bytes(graph: Graph, num_stages: int) -> float:
    """Most bytes of a bucket of gradients where a rank trains its share of the parameters of
    `graph`, and stages have equal parts of them."""
    trained = (value for value in graph.values_of(ValueKind.PARAMETER) if value.requires_grad)
    return sum_bytes(sum(value.type.num_bytes for value in trained) / num_stages)


def parameter_figures(
    type: TensorType,
    layout: ParameterLayout,
    mesh: Mesh,
    network: Network,
    optimizer: OptimizerModel,
    bucket_bytes: float = math.inf,
) -> ParameterFigures:
    """Figures of a parameter of the whole `type` on the first rank, whose parts are the largest.

    Args:
        bucket_bytes: of the buckets that it travels in, at most.
    """
    first = (0,) * len(mesh.axes)

    def size(wanted: Layout) -> int:
        return local_type(type, wanted, mesh, first).num_bytes  # a term is as large as the sum

    held, updated = size(layout.held), size(layout.state)
    summed = step = microbatch = handling = early = scatter = reduce = gather = 0.0

    def on_host(axis: str, *collectives: str) -> float:
        return sum(network.host_seconds(axis, name, held) for name in collectives)

    for number, axis in enumerate(mesh.axes):
        if isinstance(layout.held.placements[number], Shard) or axis.size == 1:
            continue
        gradient, state = layout.gradient.placements[number], layout.state.placements[number]
        half = network.sum_bytes_seconds(axis.name, held, bucket_bytes) / 2  # scatter or gather
        backend = network.backend(axis.name)
        if isinstance(gradient, Shard):
            microbatch += half
            handling += network.handling_seconds(axis.name, "reduce_scatter", held)
            step += half + on_host(axis.name, "all_gather")
            early = updated + scatter_bytes(held, updated, axis.size, backend)
        elif isinstance(gradient, Partial) and isinstance(state, Shard):
            summed += half
            step += half + on_host(axis.name, "reduce_scatter", "all_gather")
        elif isinstance(gradient, Partial):
            summed += 2 * half
            step += on_host(axis.name, "all_reduce")
        if isinstance(state, Shard):
            gather = bucket_gather_bytes(updated, axis.size)
        if isinstance(gradient, Partial) and isinstance(state, Shard):
            scatter = bucket_scatter_bytes(held, updated, axis.size, backend)
        elif isinstance(gradient, Partial):
            reduce = updated
        assert isinstance(state, Shard) or not isinstance(gradient, Shard)
    states = math.ceil(updated * optimizer.state_bytes_per_parameter_byte)
    away = layout.offloaded
    return ParameterFigures(
        gradient_bytes=size(layout.gradient),
        state_bytes=0 if away else states,
        updated_bytes=updated,
        sum_seconds=summed,
        step_seconds=step,
        microbatch_seconds=microbatch,
        handling_seconds=handling,
        host_bytes=states + 2 * updated if away else 0,
        early_bytes=early,
        scatter_bytes=scatter,
        reduce_bytes=reduce,
        gather_bytes=gather,
    )
