"""The next best layouts of a part of a graph: what it costs not to take those that a plan has.

All that is outside of the part stays as it is, and no limit of memory holds. The part's layout
program over the last mesh axis is solved again with the chosen combination forbidden: at least one
of its products runs otherwise, or if it has none, one of its nodes. (With all nodes in the cut, the
next best of a transformer's layer would differ in an addition.)
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from ...compiler.ir.graph import Graph, ValueKind
from ...compiler.ir.mesh import Layout, Replicate
from ...compiler.ir.plan import PIPELINE, Plan
from ...compiler.sharding.sharding import Sharding
from ...compiler.sharding.strategy import replicated
from ...cost_models.analysis import batch_rows
from ...cost_models.flops import is_product
from ...cost_models.overlap import Overlap
from ...cost_models.parameters import stage_bucket_bytes
from .choose import pricer_of
from .facts import GraphFacts
from .from_graph import StatedProblem, state_layouts
from .problem import Figures, Flow, LayoutProblem, figures
from .program import solve
from .statement import Decided, LayoutOptions, LayoutStatement

__all__ = ["Change", "PlannedLayouts", "RunnerUp", "planned_layouts"]


@dataclass(frozen=True, slots=True)
class Change:
    """A parameter, or the result of a node, that lies otherwise over the last axis."""

    name: str
    is_parameter: bool
    chosen: str
    instead: str


@dataclass(frozen=True, slots=True)
class RunnerUp:
    """The next best layouts of a part, with all parts that decide together with it.

    Args:
        nodes: of the part's first class, over which the differences spread evenly.
        seconds: of one microbatch, more than the plan's layouts take.
        step_seconds: once a step, likewise.
        held_bytes: parameters, gradients and states of a device, likewise.
        saved_bytes: of one microbatch, likewise.
    """

    nodes: tuple[int, ...]
    changes: tuple[Change, ...]
    seconds: float
    step_seconds: float
    held_bytes: int
    saved_bytes: int


@dataclass(frozen=True, slots=True)
class PlannedLayouts:
    """The layouts of a plan over its last axis, as picks of the layout problem."""

    graph: Graph
    stated: StatedProblem
    picks: tuple[int, ...]

    def runner_up(self, nodes: Sequence[int]) -> RunnerUp | None:
        """Of the part made of `nodes`; None if it has nothing else to choose."""
        problem = self.stated.problem
        part = self._choices(nodes)
        if all(len(problem.choices[choice].options) == 1 for choice in part):
            return None
        forbidden = {choice: self.picks[choice] for choice in self._told_apart(nodes, part)}
        found = solve(_only(problem, self.picks, part), forbidden)
        if found is None:
            return None
        picks = tuple(
            new if choice in part else old
            for choice, (old, new) in enumerate(zip(self.picks, found.picks, strict=True))
        )
        before, after = figures(problem, self.picks), figures(problem, picks)
        return self._told(nodes, picks, before, after)

    def _choices(self, nodes: Sequence[int]) -> frozenset[int]:
        """Of the nodes, and of the parameters that they read."""
        read = {value for node in nodes for value in self.graph.nodes[node].inputs}
        held = self.stated.held
        chosen = {self.stated.nodes[node] for node in nodes}
        chosen |= {
            held[value]
            for value in read
            if value in held and self.graph.values[value].kind is ValueKind.PARAMETER
        }
        return frozenset(chosen)

    def _told_apart(self, nodes: Sequence[int], part: Collection[int]) -> Collection[int]:
        """The choices of `part` that make other layouts of it: those of its products."""
        products = {self.stated.nodes[n] for n in nodes if is_product(self.graph.nodes[n])}
        choices = self.stated.problem.choices
        return products if any(len(choices[c].options) > 1 for c in products) else part

    def _told(
        self, nodes: Sequence[int], picks: tuple[int, ...], before: Figures, after: Figures
    ) -> RunnerUp:
        stated = self.stated
        together = stated.nodes[nodes[0]]
        return RunnerUp(
            nodes=tuple(node for node, choice in stated.nodes.items() if choice == together),
            changes=self._changes(nodes, picks),
            seconds=after.seconds - before.seconds,
            step_seconds=after.step_seconds - before.step_seconds,
            held_bytes=after.static_bytes - before.static_bytes,
            saved_bytes=after.saved_bytes - before.saved_bytes,
        )

    def _changes(self, nodes: Sequence[int], picks: tuple[int, ...]) -> tuple[Change, ...]:
        """Parameters first."""
        stated, graph = self.stated, self.graph
        held, made = {}, {}
        for number in nodes:
            node = graph.nodes[number]
            for value in node.inputs:
                choice = stated.held.get(value)
                if choice is not None and graph.values[value].kind is ValueKind.PARAMETER:
                    states = stated.states[choice]
                    old, new = (
                        states[taken[choice]].layout.placements[-1] for taken in (self.picks, picks)
                    )
                    if old != new:
                        name = graph.values[value].origin or graph.values[value].name
                        held[name] = Change(name, True, str(old), str(new))
            choice = stated.nodes[number]
            ways = stated.ways[choice]
            before, after = (ways[taken[choice]].strategy for taken in (self.picks, picks))
            if (before.inputs, before.outputs) != (after.inputs, after.outputs):
                made[node.name] = Change(node.name, False, str(before), str(after))
        return (*held.values(), *made.values())


def planned_layouts(plan: Plan, graph: Graph, devices: Sequence[int]) -> PlannedLayouts | None:
    """The layouts of `plan` over the last axis of its stage mesh, priced on `devices` (of one
    stage); None if they are not such as the layout problem can say."""
    mesh = plan.stage_mesh
    sharding = _before_zero(plan, graph)
    decided = _decided(graph, sharding)
    options = LayoutOptions(
        num_microbatches=plan.num_microbatches,
        batch_fraction=plan.batch_size / plan.num_microbatches / batch_rows(graph),
        optimizer=plan.optimizer,
        sum_share=Overlap.of(plan.cluster).exposed,
        bucket_bytes=stage_bucket_bytes(graph, plan.mesh.axis(PIPELINE).size),
    )
    facts = GraphFacts.of(graph)
    pricer = pricer_of(facts, mesh, mesh, plan.cluster, devices, options)
    stated = state_layouts(LayoutStatement(graph, mesh, decided, options), pricer)
    picks = _picks(graph, sharding, stated)
    if picks is None or not figures(stated.problem, picks).is_legal(stated.problem):
        return None
    return PlannedLayouts(graph, stated, picks)


def _before_zero(plan: Plan, graph: Graph) -> Sharding:
    """The sharding without ZeRO, which comes after layouts: what is held in parts over a batch axis
    is whole."""
    axes = [axis.name in LayoutOptions().batch_axes for axis in plan.stage_mesh.axes]

    def whole(layout: Layout) -> Layout:
        rows = zip(layout.placements, axes, strict=True)
        return Layout(tuple(Replicate() if batch else item for item, batch in rows))

    entries = tuple(replace(entry, held=whole(entry.held)) for entry in plan.parameter_layouts)
    return Sharding.of(replace(plan, parameter_layouts=entries), graph)


def _decided(graph: Graph, sharding: Sharding) -> Decided:
    """What is decided on all axes but the last."""
    last = len(sharding.mesh.axes) - 1
    strategies = tuple(
        (sharding.node_strategies(node) or (replicated(node),) * (last + 1))[:last]
        for node in graph.nodes
    )
    held = {
        value.id: sharding.layout(value).placements[:last]
        for value in graph.values
        if value.kind is not ValueKind.RESULT
    }
    deferred = {
        value.id: sharding.deferred[value.name] - {last}
        for value in graph.values
        if value.name in sharding.deferred
    }
    return Decided(strategies, held, deferred)


def _picks(graph: Graph, sharding: Sharding, stated: StatedProblem) -> tuple[int, ...] | None:
    """The option of every choice; None if one has no such option, or its members differ."""
    last = len(sharding.mesh.axes) - 1
    found: dict[int, set[int]] = {}
    for number, choice in stated.nodes.items():
        node = graph.nodes[number]
        ways = stated.ways[choice]
        strategy = (sharding.node_strategies(node) or (replicated(node),) * (last + 1))[last]
        wanted = strategy.inputs, strategy.outputs
        terms = any(
            last in sharding.deferred.get(graph.values[value].name, ()) for value in node.outputs
        )
        alike = [i for i, w in enumerate(ways) if (w.strategy.inputs, w.strategy.outputs) == wanted]
        best = [i for i in alike if ways[i].deferred == terms] or alike
        found.setdefault(choice, set()).update(best[:1] or (-1,))
    for index, choice in stated.held.items():
        value = graph.values[index]
        states = stated.states[choice]
        placements = sharding.layout(value).placements
        terms = last in sharding.deferred.get(value.name, ())
        alike = [i for i, state in enumerate(states) if state.layout.placements == placements]
        best = [i for i in alike if states[i].deferred == terms] or alike
        found.setdefault(choice, set()).update(best[:1] or (-1,))
    rows = [found.get(choice, {0}) for choice in range(len(stated.problem.choices))]
    if any(len(row) != 1 or -1 in row for row in rows):
        return None
    return tuple(next(iter(row)) for row in rows)


def _only(problem: LayoutProblem, picks: Sequence[int], free: Collection[int]) -> LayoutProblem:
    """`problem` with choices outside of `free` taken, and without the flows among them."""
    choices = tuple(
        choice if index in free else replace(choice, options=(choice.options[picks[index]],))
        for index, choice in enumerate(problem.choices)
    )
    flows = tuple(
        _taken(flow, picks, free)
        for flow in problem.flows
        if flow.maker in free or any(use.choice in free for use in flow.uses)
    )
    return replace(problem, choices=choices, flows=flows, memory_bytes=None, seconds_per_byte=0.0)


def _taken(flow: Flow, picks: Sequence[int], free: Collection[int]) -> Flow:
    states = flow.states if flow.maker in free else (flow.states[picks[flow.maker]],)
    uses = tuple(
        use if use.choice in free else replace(use, forms=(use.forms[picks[use.choice]],))
        for use in flow.uses
    )
    return replace(flow, states=states, uses=uses)
