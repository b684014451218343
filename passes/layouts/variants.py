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
from ...compiler.ir.ops import Category
from ...compiler.sharding.localize import localize
from ...compiler.sharding.sharding import make_sharding
from ...compiler.sharding.strategy import can_shard
from ...cost_models.collectives import mesh_network
from ...cost_models.flops import is_product
from ...cost_models.memory import memory_model
from ...cost_models.ops import price
from .choose import LayoutChoice, plan_layouts, slowest_type
from .statement import LayoutOptions

__all__ = ["Variant", "block_graph", "block_variants", "boundary_placements"]

_PRICES = (0.2, 0.6, 2.0)  # of memory, in seconds a byte of the fastest layouts


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to run a block; see `LayoutChoice` for the figures.

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
    part = localize(block, sharding, (0,) * len(choice.mesh.axes)).graph
    recompute = _Recompute.of(part, choice.mesh, cluster, devices)
    whole_ids = dict(zip((node.name for node in block.nodes), sorted(nodes), strict=True))
    sets = [set[int](), {node.id for node in part.nodes if _is_cheap(node)}, None]
    variants = []
    for chosen in sets if part.mode is Mode.TRAIN else sets[:1]:
        again = {node.id for node in part.nodes} if chosen is None else chosen
        seconds, saved, dropped = recompute.figures(again)
        names = {part.nodes[node].name for node in again}
        variants.append(
            Variant(
                boundary=boundary,
                recomputed=tuple(sorted(i for name, i in whole_ids.items() if name in names)),
                seconds=choice.seconds + seconds,
                step_seconds=choice.step_seconds,
                static_bytes=choice.static_bytes,
                saved_bytes=saved,
                transient_bytes=choice.transient_bytes + dropped,
                choice=choice,
            )
        )
    return variants


def _is_cheap(node: Node) -> bool:
    return not is_product(node) and node.op.category is not Category.COLLECTIVE


@dataclass(frozen=True, slots=True)
class _Recompute:
    """A rank's local graph of a block, with forward seconds and saved storages."""

    part: Graph
    forward_seconds: tuple[float, ...]
    saved: dict[int, float]  # storage -> bytes
    maker: dict[int, int]  # storage -> node
    root: tuple[int, ...]
    sizes: tuple[float, ...]

    @staticmethod
    def of(part: Graph, mesh: Mesh, cluster: Cluster, devices: Sequence[int]) -> _Recompute:
        kind = slowest_type(cluster, devices)
        costs = price(part, kind, network=mesh_network(cluster, mesh, devices))
        model = memory_model(part, backend=kind.backend)
        steps = model.steps(range(len(part.nodes)))
        return _Recompute(
            part=part,
            forward_seconds=tuple(cost.forward_seconds for cost in costs),
            saved=steps.saved,
            maker={storage: step.node for step in steps.forward for storage, _ in step.writes},
            root=model.storages.root,
            sizes=model.sizes,
        )

    def figures(self, again: Collection[int]) -> tuple[float, int, int]:
        """(extra seconds, saved bytes, bytes that come back for backward) if the nodes `again` are
        recomputed as far as their results are missing."""
        dropped = {s: size for s, size in self.saved.items() if self.maker.get(s) in again}
        kept = {s: size for s, size in self.saved.items() if s not in dropped}
        wanted, needed = set(dropped), set[int]()
        for node in reversed(self.part.nodes):
            writes = {s for s, maker in self.maker.items() if maker == node.id}
            passes_on = {self.root[value] for value in node.outputs} & wanted
            if node.id not in again or not (writes | passes_on) & wanted:
                continue
            needed.add(node.id)
            wanted.update(self.root[value] for value in node.inputs)
        for storage in wanted - set(dropped):
            if self.maker.get(storage) not in again and self._is_activation(storage):
                kept.setdefault(storage, self.sizes[storage])
        seconds = sum(self.forward_seconds[node] for node in needed)
        return seconds, math.ceil(sum(kept.values())), math.ceil(sum(dropped.values()))

    def _is_activation(self, storage: int) -> bool:
        kinds = (ValueKind.RESULT, ValueKind.BOUNDARY)
        return storage < len(self.part.values) and self.part.values[storage].kind in kinds
