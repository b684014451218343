"""Decide the layout of every tensor over the mesh of a stage, axis after axis.

Data parallelism comes first: inputs lie by rows, parameters are replicated, and everything else
follows. The axes after it split what is left: no dim is split over two axes. Each axis is decided
by an integer program (`program.py`) over all nodes, in which equal nodes take one decision
(`classes.py`); given the axes before, it is optimal.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ...compiler.ir.cluster import Cluster, DeviceType
from ...compiler.ir.errors import InfeasibleError
from ...compiler.ir.graph import Graph, Mode, ValueKind
from ...compiler.ir.mesh import Layout, Mesh, Partial, Replicate
from ...compiler.ir.plan import NodeLayout, ParameterLayout, ValueLayout
from ...compiler.sharding.strategy import replicated
from ...cost_models.collectives import mesh_network
from .facts import GraphFacts
from .from_graph import StatedProblem, state_layouts
from .pricing import Pricer, stacked
from .problem import Figures, figures
from .program import SolvedLayouts, Statistics, solve
from .statement import Decided, LayoutOptions, LayoutStatement

__all__ = ["LayoutChoice", "plan_layouts", "pricer_of", "slowest_type"]


@dataclass(frozen=True, slots=True)
class LayoutChoice:
    """Layouts over a mesh, with what they cost on each of its devices.

    Args:
        node_layouts, layouts, parameter_layouts: for the fields of `Plan` of these names.
        seconds: forward and backward of one microbatch, collectives included: the price of the
            local graph.
        step_seconds: once a step: summing gradients over the mesh as far as backward does not hide
            it, and the update's bytes.
        sum_seconds: of those sums, if nothing hid them.
        objective: seconds + step_seconds / microbatches.
        lower_bound: no choice over the last axis is better, given the axes before, as long as equal
            blocks are treated alike (see `classes.py`).
        static_bytes: parameters, gradients, states, buffers, inputs.
        saved_bytes: of one microbatch, from forward to backward (an additive bound).
        transient_bytes: live while one node runs.
        statistics: one an axis that had something to decide.
    """

    mesh: Mesh
    node_layouts: tuple[NodeLayout, ...]
    layouts: tuple[ValueLayout, ...]
    parameter_layouts: tuple[ParameterLayout, ...]
    seconds: float
    step_seconds: float
    sum_seconds: float
    objective: float
    lower_bound: float
    static_bytes: int
    saved_bytes: int
    transient_bytes: int
    statistics: tuple[Statistics, ...]


def plan_layouts(
    graph: Graph,
    mesh: Mesh,
    cluster: Cluster,
    devices: Sequence[int],
    options: LayoutOptions | None = None,
    facts: GraphFacts | None = None,
) -> LayoutChoice:
    """The fastest layouts of `graph` over `mesh`, laid on `devices` (last axis fastest).

    Args:
        facts: of `graph`, where layouts of it are chosen more than once.

    Raises:
        InfeasibleError: no layouts were found that fit `options.memory_bytes`.
    """
    chosen = options or LayoutOptions()
    known = facts or GraphFacts.of(graph)
    decided = Decided.nothing(graph)
    statistics: list[Statistics] = []
    stated, solved = None, None
    for count in range(1, len(mesh.axes) + 1):
        inner = Mesh(mesh.axes[:count])
        last = count == len(mesh.axes)
        if inner.axes[-1].size == 1 and not last:
            decided = _whole(graph, decided)
            continue
        stated, solved = _solve_axis(known, mesh, count, decided, cluster, devices, chosen)
        decided = stated.decode(solved.picks)
        statistics.append(solved.statistics)
    assert stated is not None and solved is not None, "a mesh has an axis"
    return _choice(graph, mesh, decided, stated, solved, tuple(statistics))


def _solve_axis(
    facts: GraphFacts,
    mesh: Mesh,
    count: int,
    decided: Decided,
    cluster: Cluster,
    devices: Sequence[int],
    options: LayoutOptions,
) -> tuple[StatedProblem, SolvedLayouts]:
    """Decide axis `count - 1`, given the ones before; memory binds on the last one only."""
    inner = Mesh(mesh.axes[:count])
    pricer = pricer_of(facts, mesh, inner, cluster, devices, options)
    last = count == len(mesh.axes)
    statement = LayoutStatement(
        facts.graph, inner, decided, options if last else _unlimited(options)
    )
    stated = state_layouts(statement, pricer)
    solved = solve(stated.problem)
    if solved is None:
        raise InfeasibleError(
            f"no layouts over {mesh} were found that fit in {options.memory_bytes} bytes a device",
            where=facts.graph.name,
            ways_out=("more devices", "smaller microbatches", "recomputation"),
        )
    return stated, solved


def pricer_of(
    facts: GraphFacts,
    mesh: Mesh,
    inner: Mesh,
    cluster: Cluster,
    devices: Sequence[int],
    options: LayoutOptions,
) -> Pricer:
    """Prices on the axes of `inner`, which are the first of `mesh`; what is known stays known,
    wherever in a cluster devices of this type meet over such links."""
    network = mesh_network(cluster, mesh, devices)
    kind = slowest_type(cluster, devices)
    rings = tuple(network.ring(axis.name) for axis in inner.axes)
    shares = options.batch_fraction, options.backward_share
    key = inner, rings, kind, shares
    if key not in facts.pricers:
        facts.pricers[key] = Pricer(facts, inner, kind, network, *shares)
    pricer: Pricer = facts.pricers[key]
    return pricer


def _unlimited(options: LayoutOptions) -> LayoutOptions:
    return replace(options, memory_bytes=None)


def _whole(graph: Graph, decided: Decided) -> Decided:
    """Over an axis of one device everything is whole."""
    strategies = tuple(
        (*before, replicated(node))
        for before, node in zip(decided.strategies, graph.nodes, strict=True)
    )
    held = {
        value.id: (*decided.held.get(value.id, ()), Replicate())
        for value in graph.values
        if value.kind is not ValueKind.RESULT
    }
    return Decided(strategies, held, decided.deferred)


def slowest_type(cluster: Cluster, devices: Sequence[int]) -> DeviceType:
    """The type of `devices`; of several types one that is as slow as the slowest in everything, as
    parts are equal and ranks wait for each other."""
    kinds = list(dict.fromkeys(cluster.type_of(device) for device in devices))
    if len(kinds) == 1:
        return kinds[0]
    dtypes = dict.fromkeys(name for kind in kinds for name, _ in kind.flops_per_second)
    rates = [dict(kind.flops_per_second) for kind in kinds]
    return DeviceType(
        name="+".join(kind.name for kind in kinds),
        backend=kinds[0].backend,
        memory_bytes=min(kind.memory_bytes for kind in kinds),
        memory_bytes_per_second=min(kind.memory_bytes_per_second for kind in kinds),
        flops_per_second=tuple(
            (name, min(table.get(name, table.get("f32", min(table.values()))) for table in rates))
            for name in dtypes
        ),
        overhead_seconds=max(kind.overhead_seconds for kind in kinds),
        unsupported_ops=tuple(dict.fromkeys(op for kind in kinds for op in kind.unsupported_ops)),
    )


def _choice(
    graph: Graph,
    mesh: Mesh,
    decided: Decided,
    stated: StatedProblem,
    solved: SolvedLayouts,
    statistics: tuple[Statistics, ...],
) -> LayoutChoice:
    found: Figures = figures(stated.problem, solved.picks)
    whole = (Replicate(),) * len(mesh.axes)
    given = [value for value in graph.values if value.id in decided.held]
    trained = {
        value.id
        for value in given
        if value.kind is ValueKind.PARAMETER and value.requires_grad and graph.mode is Mode.TRAIN
    }
    return LayoutChoice(
        mesh=mesh,
        node_layouts=_node_layouts(graph, decided),
        layouts=tuple(
            ValueLayout(value.name, Layout(decided.held[value.id]))
            for value in given
            if value.id not in trained and decided.held[value.id] != whole
        ),
        parameter_layouts=tuple(
            _parameter_layout(value.name, decided, value.id)
            for value in given
            if value.id in trained
            and (decided.held[value.id] != whole or decided.deferred.get(value.id))
        ),
        seconds=found.seconds,
        step_seconds=found.step_seconds,
        sum_seconds=found.sum_seconds,
        objective=solved.objective,
        lower_bound=solved.lower_bound,
        static_bytes=found.static_bytes,
        saved_bytes=found.saved_bytes,
        transient_bytes=found.transient_bytes,
        statistics=statistics,
    )


def _node_layouts(graph: Graph, decided: Decided) -> tuple[NodeLayout, ...]:
    """Nodes of equal layouts together; replicated nodes have no entry."""
    groups: dict[tuple[tuple[Layout, ...], tuple[Layout, ...]], list[int]] = defaultdict(list)
    for node, strategies in zip(graph.nodes, decided.strategies, strict=True):
        if all(strategy.is_replicated for strategy in strategies):
            continue
        inputs = stacked([strategy.inputs for strategy in strategies])
        outputs = stacked([strategy.outputs for strategy in strategies])
        groups[inputs, outputs].append(node.id)
    return tuple(
        NodeLayout(tuple(nodes), inputs, outputs) for (inputs, outputs), nodes in groups.items()
    )


def _parameter_layout(name: str, decided: Decided, value: int) -> ParameterLayout:
    held = decided.held[value]
    axes = decided.deferred.get(value, frozenset())
    gradient = tuple(Partial() if axis in axes else item for axis, item in enumerate(held))
    return ParameterLayout(name, held=Layout(held), gradient=Layout(gradient), state=Layout(held))
