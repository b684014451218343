"""A pipeline over an in-stage mesh, seen from one column: the local graph, one device a stage.

All columns run the same pipeline, so it is planned once: on the local graph of the first rank,
whose parts are the largest, and a cluster in which each stage's devices are one. Stages found there
are those of the nodes that end each computation.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from ..compiler.ir.cluster import Cluster
from ..compiler.ir.graph import Graph, Mode, ValueKind, producers, users
from ..compiler.ir.mesh import Layout, Mesh, Shard
from ..compiler.ir.plan import PIPELINE, ParameterLayout, Plan, Stage
from ..compiler.sharding.localize import LocalPart, localize
from ..compiler.sharding.recompute import recomputed_locally
from ..compiler.sharding.sharding import Sharding
from ..cost_models.collectives import Network, mesh_network
from ..cost_models.links import all_reduce_seconds
from ..cost_models.parameters import ParameterFigures, parameter_figures, stage_bucket_bytes
from ..cost_models.slowest import slowest_type
from .context import Context
from .replicate import complete_stages, replicated_nodes

__all__ = ["Column", "column_of", "layouts_key", "parameters_of", "stage_devices"]


@dataclass(frozen=True, slots=True)
class Column:
    """The first column of a plan's mesh.

    Args:
        plan: for the local graph on one device a stage.
        context: with the local graph.
        groups: the devices of each stage.
        part: the local graph with its origins; None if nothing is sharded.
    """

    plan: Plan
    context: Context
    groups: tuple[tuple[int, ...], ...]
    part: LocalPart | None = None
    sharding: Sharding | None = None

    def spread(self, stages: tuple[Stage, ...], graph: Graph) -> tuple[Stage, ...]:
        """Stages of the whole graph on all devices, from those of the column."""
        if self.part is None:
            return stages
        home = _homes(graph, self.part, stages)
        replicated = replicated_nodes(graph)
        groups: list[set[int]] = [set() for _ in stages]
        for node, stage in home.items():
            if node not in replicated:
                groups[stage].add(node)
        complete_stages(graph, groups)
        return tuple(
            Stage(stage.index, self.groups[stage.device], tuple(sorted(nodes)))
            for stage, nodes in zip(stages, groups, strict=True)
        )

    def narrow(self, stages: tuple[Stage, ...]) -> tuple[Stage, ...]:
        """The local nodes of each stage of the whole graph, on the column's devices."""
        if self.part is None:
            return stages
        device = {group: index for index, group in enumerate(self.groups)}
        return tuple(
            Stage(stage.index, (device[stage.devices],), _local_nodes(self.part, set(stage.nodes)))
            for stage in stages
        )


def _homes(graph: Graph, part: LocalPart, stages: tuple[Stage, ...]) -> dict[int, int]:
    """Stage of every node: of the local node that ends it, else of what it is computed from."""
    local: dict[int, int] = {}
    for stage in reversed(stages):
        local.update(dict.fromkeys(stage.nodes, stage.index))
    made_by, read_by = producers(graph), users(graph)
    home: dict[int, int] = {}
    for node in graph.nodes:
        last = part.lasts[node.id]
        if last is not None and last in local:
            home[node.id] = local[last]
            continue
        sources = [home[made_by[value]] for value in node.inputs if made_by.get(value) in home]
        if sources:
            home[node.id] = max(sources)
    for node in reversed(graph.nodes):
        if node.id not in home:
            later = [
                home[user] for value in node.outputs for user in read_by[value] if user in home
            ]
            home[node.id] = min(later, default=len(stages) - 1)
    return home


def _bound(graph: Graph, part: LocalPart) -> Iterator[tuple[int, ...]]:
    """The local nodes for one node of the whole graph: none of them is a stage without it.

    What is for a node that every stage may compute itself goes with who reads it first.
    """
    replicated = replicated_nodes(graph)
    ends = {last for node, last in enumerate(part.lasts) if node not in replicated}
    read_by = users(part.graph)
    for number, origin in enumerate(part.origins):
        last = part.lasts[origin]
        if number in ends:
            continue
        if last is not None and last in ends:
            yield number, last
            continue
        outputs = part.graph.nodes[number].outputs
        readers = sorted(reader for value in outputs for reader in read_by[value])
        if readers:
            yield number, readers[0]


def _local_nodes(part: LocalPart, nodes: set[int]) -> tuple[int, ...]:
    """Local nodes of a stage: a stage makes all conversions that it reads, and those of its results
    that are outputs of the graph."""
    made_by = producers(part.graph)
    returned = {made_by.get(output.value) for output in part.graph.outputs}
    chosen: set[int] = set()
    for number in reversed(range(len(part.graph.nodes))):
        is_own = number not in part.conversions or number in returned
        if is_own and part.origins[number] in nodes:
            chosen.add(number)
        if number in chosen:
            sources = (made_by.get(value) for value in part.graph.nodes[number].inputs)
            chosen.update(item for item in sources if item is not None and item in part.conversions)
    return tuple(sorted(chosen))


def layouts_key(plan: Plan) -> object:
    """Equal for plans of one graph with the same local graph."""
    held = tuple(entry.held for entry in plan.parameter_layouts)
    return plan.stage_mesh, plan.node_layouts, plan.layouts, held


def column_of(plan: Plan, context: Context) -> Column:
    """The first column of `plan`, whose mesh and layouts are decided; plans with the same layouts
    share its local graph."""
    if plan.stage_mesh.size == 1:
        pinned = context.options.mesh
        if pinned is not None:
            options = replace(context.options, num_stages=pinned.axis(PIPELINE).size)
            context = replace(context, options=options)
        column = Column(plan, context, ())
        parameters = parameters_of(plan, context.graph, column)
        return replace(column, context=replace(context, parameters=parameters))
    groups = stage_devices(plan.mesh)
    sharding, part, bound = _local_part(plan, context)
    network = slowest_network(plan.cluster, plan.stage_mesh, groups)
    local_plan = replace(
        plan,
        cluster=_stage_cluster(plan.cluster, groups),
        batch_size=plan.batch_size // _row_parts(context.graph, part.graph),
        mesh=Mesh(()),
        layouts=(),
        parameter_layouts=(),
        node_layouts=(),
        recomputed=recomputed_locally(part, plan.recomputed),
    )
    local_context = replace(
        context,
        graph=part.graph,
        options=replace(
            context.options, num_stages=len(groups), num_microbatches=plan.num_microbatches or None
        ),
        network=network,
        bound=bound,
    )
    column = Column(local_plan, local_context, groups, part, sharding)
    parameters = parameters_of(plan, context.graph, column)
    return replace(column, context=replace(local_context, parameters=parameters))


def _local_part(
    plan: Plan, context: Context
) -> tuple[Sharding, LocalPart, tuple[tuple[int, ...], ...]]:
    """The local graph of `plan`, with how it comes about and what of it is `_bound`."""
    key = layouts_key(plan)
    if key not in context.parts:
        sharding = Sharding.of(plan, context.graph)
        part = localize(context.graph, sharding, (0,) * len(plan.stage_mesh.axes))
        context.parts[key] = sharding, part, tuple(_bound(context.graph, part))
    found: tuple[Sharding, LocalPart, tuple[tuple[int, ...], ...]] = context.parts[key]
    return found


def stage_devices(mesh: Mesh) -> tuple[tuple[int, ...], ...]:
    """Devices of each stage, in the order of the in-stage axes, when ranks follow `mesh`."""
    inner = [axis for axis in mesh.axes if axis.name != PIPELINE]
    number = {
        place: device
        for device, place in enumerate(itertools.product(*(range(a.size) for a in mesh.axes)))
    }
    names = [axis.name for axis in mesh.axes]
    table = []
    for stage in range(mesh.axis(PIPELINE).size):
        devices = []
        for place in itertools.product(*(range(axis.size) for axis in inner)):
            known = {axis.name: index for axis, index in zip(inner, place, strict=True)}
            devices.append(number[tuple(known.get(name, stage) for name in names)])
        table.append(tuple(devices))
    return tuple(table)


def slowest_network(cluster: Cluster, mesh: Mesh, groups: Iterable[tuple[int, ...]]) -> Network:
    """For each axis the slowest group of any stage."""
    networks = [mesh_network(cluster, mesh, group) for group in groups]
    chosen = []
    for axis in mesh.axes:
        found = (network.group(axis.name) for network in networks)
        chosen.append((axis.name, max(found, key=lambda g: all_reduce_seconds(cluster, g, 1e6))))
    return Network(cluster, tuple(chosen))


def _stage_cluster(cluster: Cluster, groups: tuple[tuple[int, ...], ...]) -> Cluster:
    """One device a stage: that of the first column, as slow as the slowest of its stage."""
    kinds = [slowest_type(cluster, group) for group in groups]
    devices = tuple(
        replace(cluster.devices[group[0]], index=index, type=kind.name)
        for index, (group, kind) in enumerate(zip(groups, kinds, strict=True))
    )
    return replace(cluster, types=tuple(dict.fromkeys((*cluster.types, *kinds))), devices=devices)


def _row_parts(graph: Graph, local: Graph) -> int:
    """Into how many parts the mesh splits the rows of a microbatch."""
    for whole, part in zip(graph.inputs, local.inputs, strict=True):
        dim = graph.values[whole].batch_dim
        if dim is not None:
            return graph.values[whole].type.shape[dim] // local.values[part].type.shape[dim]
    return 1


def parameters_of(plan: Plan, graph: Graph, column: Column) -> Mapping[int, ParameterFigures]:
    """Figures of the trained parameters of `column`, by value of its local graph, if gradients and
    states lie as `plan` says."""
    network, sharding = column.context.network, column.sharding
    if graph.mode is not Mode.TRAIN:
        return {}
    whole = graph.by_name()
    layouts = {entry.value: entry for entry in plan.parameter_layouts}
    if network is None or sharding is None:  # a rank holds all or nothing of a parameter
        alone, mesh = Network(plan.cluster, ()), plan.stage_mesh
        return {
            whole[name].id: parameter_figures(whole[name].type, entry, mesh, alone, plan.optimizer)
            for name, entry in layouts.items()
            if whole[name].requires_grad
        }
    table = {}
    bucket_bytes = stage_bucket_bytes(column.context.graph, plan.mesh.axis(PIPELINE).size)
    for value in column.context.graph.values_of(ValueKind.PARAMETER):
        if value.requires_grad:
            source = whole[value.name]
            held, gradient = sharding.layout(source), sharding.gradient_layout(source)
            layout = layouts.get(value.name) or ParameterLayout(value.name, held, gradient, held)
            layout = replace(layout, gradient=_with_terms(layout.gradient, gradient))
            table[value.id] = parameter_figures(
                source.type, layout, sharding.mesh, network, plan.optimizer, bucket_bytes
            )
    return table


def _with_terms(wanted: Layout, derived: Layout) -> Layout:
    """The gradient layout that a plan asks for, whose terms follow from the layouts of nodes."""
    pairs = zip(wanted.placements, derived.placements, strict=True)
    return Layout(tuple(a if isinstance(a, Shard) else b for a, b in pairs))
