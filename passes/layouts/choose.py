"""Decide the layout of every tensor over the mesh of a stage, axis after axis.

Data parallelism comes first: inputs lie by rows, parameters are replicated, and everything else
follows. The axes after it split what is left: no dim is split over two axes. Each axis is decided
by an integer program (`program.py`) over all nodes, in which equal nodes take one decision
(`classes.py`); given the axes before, it is optimal.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ...compiler.ir.cluster import Cluster
from ...compiler.ir.errors import InfeasibleError
from ...compiler.ir.graph import Graph, Mode, ValueKind
from ...compiler.ir.mesh import Layout, Mesh, Partial, Replicate
from ...compiler.ir.plan import NodeLayout, ParameterLayout, ValueLayout
from ...compiler.sharding.strategy import replicated
from ...cost_models.collectives import mesh_network
from ...cost_models.slowest import slowest_type
from .facts import GraphFacts
from .from_graph import StatedProblem, state_layouts
from .pricing import Pricer, stacked
from .problem import Choice, Figures, LayoutProblem, figures
from .program import SolvedLayouts, Statistics, relax, solve
from .statement import Decided, LayoutOptions, LayoutStatement

__all__ = [
    "AxesBefore",
    "LayoutChoice",
    "LayoutFront",
    "Memory",
    "is_trained",
    "node_layouts",
    "parameter_layout",
    "plan_layouts",
    "pricer_of",
]


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
        picks: options taken over the last axis.
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
    picks: tuple[int, ...]


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
        InfeasibleError: no layouts are legal, or none were found that fit `options.memory_bytes`.
    """
    chosen = options or LayoutOptions()
    front = LayoutFront.of(facts or GraphFacts.of(graph), mesh, cluster, devices, chosen)
    choice = front.within(Memory(chosen.memory_bytes, chosen.in_flight))
    if choice is None:
        raise InfeasibleError(
            f"no layouts over {mesh} were found that fit in {chosen.memory_bytes} bytes a device",
            where=graph.name,
            ways_out=("more devices", "smaller microbatches", "recomputation"),
        )
    return choice


@dataclass(frozen=True, slots=True)
class Memory:
    """What layouts have to fit into, and how their bytes are counted.

    Args:
        limit_bytes: of one device; None: none.
        in_flight: microbatches whose saved tensors are alive at once, see `LayoutOptions`.
        trained_share: of parameters, gradients and states that are held under these layouts, what
            is left when ZeRO splits them further or they are offloaded.
        input_share: of the inputs of as many microbatches as `LayoutOptions` says, what is held.
    """

    limit_bytes: int | None = None
    in_flight: float = 1.0
    trained_share: float = 1.0
    input_share: float = 1.0

    def is_within(self, other: Memory) -> bool:
        """Whether layouts that do not fit into `other` do not fit into this either."""
        if self.limit_bytes is None:
            return other.limit_bytes is None
        return (
            (other.limit_bytes is None or self.limit_bytes <= other.limit_bytes)
            and self.in_flight >= other.in_flight
            and self.trained_share >= other.trained_share
            and self.input_share >= other.input_share
        )


@dataclass(frozen=True, slots=True)
class AxesBefore:
    """What is decided over all axes of a mesh but the last, one after the other."""

    decided: Decided
    statistics: tuple[Statistics, ...]

    @staticmethod
    def decide(
        facts: GraphFacts,
        mesh: Mesh,
        cluster: Cluster,
        devices: Sequence[int],
        options: LayoutOptions,
    ) -> AxesBefore:
        """For the graph of `facts` over `mesh`, laid on `devices` (last axis fastest).

        Raises:
            InfeasibleError: no layouts are legal.
        """
        decided = Decided.nothing(facts.graph)
        statistics: list[Statistics] = []
        for count in range(1, len(mesh.axes)):
            if mesh.axes[count - 1].size == 1:
                decided = _whole(facts.graph, decided)
                continue
            inner = Mesh(mesh.axes[:count])
            stated = _state_axis(facts, mesh, count, decided, cluster, devices, options)
            solved = _legal(solve(stated.problem), facts.graph, inner)
            decided = stated.decode(solved.picks)
            statistics.append(solved.statistics)
        return AxesBefore(decided, tuple(statistics))


@dataclass(frozen=True, slots=True)
class LayoutFront:
    """Layouts over a mesh, stated once, to be solved under one memory after another: each is the
    fastest of those that fit, so that less and less memory walks the front of time and bytes.

    Memory binds on the last axis only; the ones before are decided for speed.
    """

    graph: Graph
    mesh: Mesh
    stated: StatedProblem
    before: AxesBefore
    fastest: SolvedLayouts  # without a limit

    @staticmethod
    def of(
        facts: GraphFacts,
        mesh: Mesh,
        cluster: Cluster,
        devices: Sequence[int],
        options: LayoutOptions,
        before: AxesBefore | None = None,
    ) -> LayoutFront:
        """Of the graph of `facts` over `mesh`, laid on `devices` (last axis fastest).

        Args:
            before: what is decided over the axes before the last; None: by these `options`.

        Raises:
            InfeasibleError: no layouts are legal.
        """
        before = before or AxesBefore.decide(facts, mesh, cluster, devices, options)
        stated = _state_axis(facts, mesh, len(mesh.axes), before.decided, cluster, devices, options)
        fastest = _legal(solve(stated.problem), facts.graph, mesh)
        return LayoutFront(facts.graph, mesh, stated, before, fastest)

    @property
    def num_options(self) -> int:
        """Of all choices of the last axis: what solving takes grows with its square, or faster."""
        return sum(len(choice.options) for choice in self.stated.problem.choices)

    def within(self, memory: Memory, others: Sequence[LayoutChoice] = ()) -> LayoutChoice | None:
        """The fastest layouts within `memory`, none of `others`; None if none were found."""
        problem = self._problem(memory)
        solved: SolvedLayouts | None = self.fastest
        if others or not self._fits_fastest(problem):
            solved = solve(problem, *(dict(enumerate(choice.picks)) for choice in others))
        if solved is None:
            return None
        decided = self.stated.decode(solved.picks)
        statistics = (*self.before.statistics, solved.statistics)
        return _choice(self.graph, self.mesh, decided, problem, solved, statistics)

    def lower_bound(self, memory: Memory) -> float:
        """Objective that no layouts are below whose bytes from forward to backward are within
        `memory`; what lives only while one node runs is not counted. Infinite if there are none."""
        problem = self._problem(memory)
        choices = tuple(_at_rest(choice) for choice in problem.choices)
        problem = replace(problem, choices=choices)
        return self.fastest.lower_bound if self._fits_fastest(problem) else relax(problem)

    def objective(self, picks: tuple[int, ...]) -> float:
        """Of options `picks` over the last axis, without a limit of memory."""
        return figures(self.stated.problem, picks).objective(self.stated.problem)

    def _fits_fastest(self, problem: LayoutProblem) -> bool:
        return figures(problem, self.fastest.picks).is_legal(problem)

    def _problem(self, memory: Memory) -> LayoutProblem:
        """The problem of the last axis under `memory`."""
        problem = replace(
            self.stated.problem, memory_bytes=memory.limit_bytes, in_flight=memory.in_flight
        )
        if memory == Memory(memory.limit_bytes, memory.in_flight):
            return problem
        shares: dict[int, float] = {}
        for index, choice in self.stated.held.items():
            if is_trained(self.graph, index):
                shares[choice] = memory.trained_share
            elif self.graph.values[index].batch_dim is not None:
                shares[choice] = memory.input_share
        choices = tuple(
            _held_as(choice, shares[index]) if index in shares else choice
            for index, choice in enumerate(problem.choices)
        )
        return replace(problem, choices=choices)


def _legal(solved: SolvedLayouts | None, graph: Graph, mesh: Mesh) -> SolvedLayouts:
    if solved is None:
        raise InfeasibleError(
            f"no layouts over {mesh} are legal",
            where=graph.name,
            ways_out=("pin fewer layouts", "another mesh"),
        )
    return solved


def _held_as(choice: Choice, share: float) -> Choice:
    """`choice` with a share of its static bytes."""
    options = (
        replace(option, static_bytes=math.ceil(share * option.static_bytes))
        for option in choice.options
    )
    return replace(choice, options=tuple(options))


def _at_rest(choice: Choice) -> Choice:
    options = (replace(option, transient_bytes=0) for option in choice.options)
    return replace(choice, options=tuple(options))


def _state_axis(
    facts: GraphFacts,
    mesh: Mesh,
    count: int,
    decided: Decided,
    cluster: Cluster,
    devices: Sequence[int],
    options: LayoutOptions,
) -> StatedProblem:
    """The problem of axis `count - 1`, given the ones before, without a limit of memory."""
    inner = Mesh(mesh.axes[:count])
    pricer = pricer_of(facts, mesh, inner, cluster, devices, options)
    unlimited = replace(options, memory_bytes=None)
    return state_layouts(LayoutStatement(facts.graph, inner, decided, unlimited), pricer)


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
    key = inner, rings, kind, options.batch_fraction
    if key not in facts.pricers:
        facts.pricers[key] = Pricer(facts, inner, kind, network, options.batch_fraction)
    pricer: Pricer = facts.pricers[key]
    return pricer


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


def _choice(
    graph: Graph,
    mesh: Mesh,
    decided: Decided,
    problem: LayoutProblem,
    solved: SolvedLayouts,
    statistics: tuple[Statistics, ...],
) -> LayoutChoice:
    found: Figures = figures(problem, solved.picks)
    whole = (Replicate(),) * len(mesh.axes)
    given = [value for value in graph.values if value.id in decided.held]
    trained = {value.id for value in given if is_trained(graph, value.id)}
    return LayoutChoice(
        mesh=mesh,
        node_layouts=node_layouts(graph, decided),
        layouts=tuple(
            ValueLayout(value.name, Layout(decided.held[value.id]))
            for value in given
            if value.id not in trained and decided.held[value.id] != whole
        ),
        parameter_layouts=tuple(
            parameter_layout(value.name, decided, value.id)
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
        picks=solved.picks,
    )


def is_trained(graph: Graph, index: int) -> bool:
    """Whether value `index` of `graph` is a parameter that is trained."""
    value = graph.values[index]
    return value.kind is ValueKind.PARAMETER and value.requires_grad and graph.mode is Mode.TRAIN


def node_layouts(graph: Graph, decided: Decided) -> tuple[NodeLayout, ...]:
    """What `decided` says of nodes: those of equal layouts together; without replicated ones."""
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


def parameter_layout(name: str, decided: Decided, value: int) -> ParameterLayout:
    """What `decided` says of the parameter `name`, which is `value` of the graph."""
    held = decided.held[value]
    axes = decided.deferred.get(value, frozenset())
    gradient = tuple(Partial() if axis in axes else item for axis, item in enumerate(held))
    return ParameterLayout(name, held=Layout(held), gradient=Layout(gradient), state=Layout(held))
