"""The ways to run one block that a pipeline partitioner chooses from: fast ones and lean ones.

A block is cut out as a graph of its own whose boundary values lie in a given placement, so that
variants of one boundary placement can follow each other without conversion. For each placement the
layout program is solved for seconds alone and with rising prices of memory; each layout is then
offered with nothing recomputed, with all that is no matrix product recomputed (selective
activation recomputation; Korthikanti et al., 2022), and with the whole block recomputed (Chen et
al., 2016). Variants that another one beats in seconds and every kind of bytes are left out.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from ...compiler.ir.cluster import Cluster
from ...compiler.ir.graph import Graph, Mode, Node, Output, OutputKind, Value, ValueKind
from ...compiler.ir.mesh import Mesh, Placement, Replicate, Shard
from ...compiler.sharding.localize import localize
from ...compiler.sharding.recompute import recomputed_locally
from ...compiler.sharding.sharding import make_sharding
from ...compiler.sharding.strategy import can_shard
from ...cost_models.collectives import mesh_network
from ...cost_models.flops import is_product
from ...cost_models.memory import action_memory, memory_model
from ...cost_models.ops import price
from .choose import LayoutChoice, plan_layouts, slowest_type
from .statement import LayoutOptions

__all__ = ["Variant", "block_graph", "block_variants", "boundary_placements"]

_PRICES = (0.2, 0.6, 2.0)  # of memory, in seconds a byte of the fastest layouts


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to run a block.

    Saved and transient bytes are those of the local graph by liveness; for the other figures see
    `LayoutChoice`.

    Args:
        boundary: placement of the boundary values over the last mesh axis.
        recomputed: node ids of the whole graph whose results are computed again in backward.
        choice: layouts, by node ids of the block's own graph (`block_graph`).
    """

    boundary: Placement
    recomputed: tuple[int, ...]
    seconds: float
    step_seconds: float
    static_bytes: int
    saved_bytes: int
    transient_bytes: int
    choice: LayoutChoice

    def beats(self, other: Variant) -> bool:
        """Whether it is as good in everything, at the same boundary, and better in something."""
        mine, theirs = self._figures(), other._figures()
        better = all(a <= b for a, b in zip(mine, theirs, strict=True)) and mine != theirs
        return self.boundary == other.boundary and better

    def _figures(self) -> tuple[float, ...]:
        return (
            self.seconds,
            self.step_seconds,
            self.static_bytes,
            self.saved_bytes,
            self.transient_bytes,
        )


def block_variants(
    graph: Graph,
    nodes: Sequence[int],
    mesh: Mesh,
    cluster: Cluster,
    devices: Sequence[int],
    options: LayoutOptions | None = None,
) -> tuple[Variant, ...]:
    """The Pareto front of the block made of `nodes`, by boundary placement, then seconds."""
    block = block_graph(graph, nodes)
    found: list[Variant] = []
    for placement in boundary_placements(block, mesh):
        boundary = {value.name: placement for value in _crossing(block)}
        wanted = replace(options or LayoutOptions(), boundary=boundary, memory_bytes=None)
        for choice in _choices(block, mesh, cluster, devices, wanted):
            found.extend(_recomputing(block, nodes, choice, placement, cluster, devices))
    front = [item for item in found if not any(other.beats(item) for other in found)]
    unique = {(item.boundary, item._figures()): item for item in reversed(front)}
    return tuple(
        sorted(
            unique.values(), key=lambda item: (str(item.boundary), item.seconds, item.saved_bytes)
        )
    )


def _choices(
    block: Graph,
    mesh: Mesh,
    cluster: Cluster,
    devices: Sequence[int],
    options: LayoutOptions,
) -> list[LayoutChoice]:
    """The fastest layouts, and the best ones at rising prices of memory."""
    fastest = plan_layouts(block, mesh, cluster, devices, options)
    held = fastest.static_bytes + options.in_flight * fastest.saved_bytes
    rate = fastest.objective / max(held, 1)
    choices = [fastest]
    for factor in _PRICES:
        priced = replace(options, seconds_per_byte=factor * rate)
        choices.append(plan_layouts(block, mesh, cluster, devices, priced))
    return choices


# -- the block as a graph --------------------------------------------------------------------------


def block_graph(graph: Graph, nodes: Sequence[int]) -> Graph:
    """`nodes` of `graph` as a graph: what other nodes make or read is at its boundary."""
    chosen = sorted(nodes)
    made = {value for node in chosen for value in graph.nodes[node].outputs}
    read = {value for node in chosen for value in graph.nodes[node].inputs}
    numbers = {value: index for index, value in enumerate(sorted(made | read))}
    values = []
    for old, new in numbers.items():
        value = graph.values[old]
        outside = value.kind is ValueKind.RESULT and old not in made
        values.append(replace(value, id=new, kind=ValueKind.BOUNDARY if outside else value.kind))
    return Graph(
        name=graph.name,
        mode=graph.mode,
        values=tuple(values),
        nodes=tuple(
            _renumbered(graph.nodes[node], index, numbers) for index, node in enumerate(chosen)
        ),
        inputs=tuple(numbers[value] for value in graph.inputs if value in numbers),
        outputs=_outputs(graph, set(chosen), made, numbers),
    )


def _renumbered(node: Node, index: int, numbers: dict[int, int]) -> Node:
    inputs = tuple(numbers[value] for value in node.inputs)
    return replace(node, id=index, inputs=inputs, outputs=tuple(numbers[v] for v in node.outputs))


def _outputs(
    graph: Graph, chosen: Collection[int], made: Collection[int], numbers: dict[int, int]
) -> tuple[Output, ...]:
    returned = [
        replace(output, value=numbers[output.value])
        for output in graph.outputs
        if output.value in made
    ]
    read_outside = {
        value
        for node in graph.nodes
        if node.id not in chosen
        for value in node.inputs
        if value in made
    }
    sent = [Output(OutputKind.BOUNDARY, numbers[value]) for value in sorted(read_outside)]
    return (*returned, *sent)


def _crossing(block: Graph) -> list[Value]:
    """Activations at the boundary that carry a gradient (tables and masks stay whole)."""
    sent = {output.value for output in block.outputs_of(OutputKind.BOUNDARY)}
    return [
        value
        for value in block.values
        if value.requires_grad and (value.kind is ValueKind.BOUNDARY or value.id in sent)
    ]


def boundary_placements(block: Graph, mesh: Mesh) -> tuple[Placement, ...]:
    """Replicated, or split along a dim in which all boundary activations can be split, but the one
    that `data` splits."""
    crossing = _crossing(block)
    rank = min((len(value.type.shape) for value in crossing), default=0)
    first = 1 if len(mesh.axes) > 1 else 0
    parts = mesh.axes[-1].size
    return (
        Replicate(),
        *(
            Shard(dim)
            for dim in range(first, rank)
            if all(can_shard(value.type, dim, parts) for value in crossing)
        ),
    )


# -- recomputation ---------------------------------------------------------------------------------


def _recomputing(
    block: Graph,
    nodes: Sequence[int],
    choice: LayoutChoice,
    boundary: Placement,
    cluster: Cluster,
    devices: Sequence[int],
) -> list[Variant]:
    """`choice` with nothing, with what is cheap and with everything recomputed."""
    sharding = make_sharding(
        block, choice.mesh, choice.node_layouts, choice.layouts, choice.parameter_layouts
    )
    part = localize(block, sharding, (0,) * len(choice.mesh.axes))
    kind = slowest_type(cluster, devices)
    costs = price(part.graph, kind, network=mesh_network(cluster, choice.mesh, devices))
    model = memory_model(part.graph, backend=kind.backend)
    whole = sorted(nodes)
    sets: list[tuple[int, ...]] = [()]
    if block.mode is Mode.TRAIN:
        cheap = (node.id for node in block.nodes if not is_product(node))
        sets += [tuple(cheap), tuple(node.id for node in block.nodes)]
    variants = []
    for chosen in dict.fromkeys(sets):
        again = recomputed_locally(part, chosen)
        steps = model.steps(range(len(part.graph.nodes)), recomputed=again)
        memory = action_memory(model, None, again)
        variants.append(
            Variant(
                boundary=boundary,
                recomputed=tuple(whole[node] for node in chosen),
                seconds=choice.seconds + sum(costs[node].forward_seconds for node in steps.rerun),
                step_seconds=choice.step_seconds,
                static_bytes=choice.static_bytes,
                saved_bytes=math.ceil(memory.saved_bytes),
                transient_bytes=math.ceil(memory.peak_bytes - memory.saved_bytes),
                choice=choice,
            )
        )
    return variants
