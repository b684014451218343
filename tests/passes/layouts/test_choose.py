from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cutset.compiler.ir.cluster import Cluster, Device, DeviceType, Link, LinkRule
from cutset.compiler.ir.graph import Graph
from cutset.compiler.ir.mesh import Mesh
from cutset.compiler.ir.plan import OptimizerModel
from cutset.compiler.sharding.localize import localize
from cutset.compiler.sharding.sharding import make_sharding
from cutset.cost_models.collectives import mesh_network
from cutset.cost_models.ops import price
from cutset.passes.layouts import from_graph
from cutset.passes.layouts.choose import LayoutChoice, LayoutFront, plan_layouts, pricer_of
from cutset.passes.layouts.facts import GraphFacts
from cutset.passes.layouts.from_graph import StatedProblem, state_layouts
from cutset.passes.layouts.pricing import Pricer
from cutset.passes.layouts.problem import Option, figures
from cutset.passes.layouts.program import solve
from cutset.passes.layouts.statement import Decided, LayoutOptions, LayoutStatement
from tests.ir.builders import mlp

from .brute import brute_force, graphs


def cluster(count: int, bytes_per_second: float, latency: float = 1e-7) -> Cluster:
    """Devices of small overhead, so that parts of small tensors pay."""
    kind = DeviceType("chip", "cuda", 1 << 40, 1e9, (("f32", 1e10),), 1e-8)
    devices = tuple(Device(index, "chip", "node") for index in range(count))
    return Cluster("chips", (kind,), devices, (LinkRule(Link(latency, bytes_per_second)),))


def stated(graph: Graph, mesh: Mesh, machine: Cluster, options: LayoutOptions) -> StatedProblem:
    """The problem of the only axis of `mesh`."""
    network = mesh_network(machine, mesh, tuple(range(mesh.size)))
    pricer = Pricer(GraphFacts.of(graph), mesh, machine.types[0], network)
    return state_layouts(LayoutStatement(graph, mesh, Decided.nothing(graph), options), pricer)


def local_seconds(
    graph: Graph, choice: LayoutChoice, machine: Cluster, batch_fraction: float = 1.0
) -> float:
    """Price of the first rank's local graph."""
    sharding = make_sharding(
        graph, choice.mesh, choice.node_layouts, choice.layouts, choice.parameter_layouts
    )
    part = localize(graph, sharding, (0,) * len(choice.mesh.axes)).graph
    network = mesh_network(machine, choice.mesh, tuple(range(choice.mesh.size)))
    costs = price(part, machine.types[0], batch_fraction=batch_fraction, network=network)
    return sum(cost.total_seconds for cost in costs)


_SPEEDS = st.sampled_from((1e7, 1e9, 1e11))


@settings(max_examples=100)
@given(graphs(most_nodes=3), st.integers(2, 4), _SPEEDS, st.integers(1, 4))
def test_choice_is_the_best_of_all(
    graph: Graph, parts: int, speed: float, num_microbatches: int
) -> None:
    options = LayoutOptions(num_microbatches=num_microbatches)
    problem = stated(graph, Mesh.parse(f"tensor={parts}"), cluster(parts, speed), options).problem
    assume(math.prod(len(choice.options) for choice in problem.choices) <= 30_000)
    solved = solve(problem)
    assert solved is not None
    assert solved.objective == pytest.approx(
        brute_force(problem), rel=1e-9 if solved.statistics.relaxation_integral else 1.1e-3
    )
    assert solved.lower_bound <= solved.objective


@settings(max_examples=60)
@given(
    graphs(most_nodes=6),
    st.sampled_from(("tensor=2", "tensor=4", "data=2,tensor=2")),
    _SPEEDS,
    st.sampled_from((1.0, 0.5, 8.0)),
)
def test_objective_is_the_price_of_the_local_graph(
    graph: Graph, mesh: str, speed: float, fraction: float
) -> None:
    parsed = Mesh.parse(mesh)
    machine = cluster(parsed.size, speed)
    options = LayoutOptions(batch_fraction=fraction)
    choice = plan_layouts(graph, parsed, machine, tuple(range(parsed.size)), options)
    wanted = local_seconds(graph, choice, machine, fraction)
    assert choice.seconds == pytest.approx(wanted, rel=1e-9)


def frames_made(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Grows with every frame that is stated from now on."""
    made: list[object] = []
    plain = from_graph._frame

    def counted(statement: LayoutStatement, pricer: Pricer) -> object:
        made.append(statement)
        return plain(statement, pricer)

    monkeypatch.setattr(from_graph, "_frame", counted)
    return made


def test_what_differs_in_how_tensors_are_held_is_stated_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    graph, mesh, machine = mlp(), Mesh.parse("data=2,tensor=2"), cluster(4, 1e9)
    made = frames_made(monkeypatch)
    facts = GraphFacts.of(graph)
    for options in (
        LayoutOptions(),
        LayoutOptions(num_microbatches=4),
        LayoutOptions(memory_bytes=1 << 30, in_flight=2.0),
        LayoutOptions(optimizer=OptimizerModel("sgd", 0.0), update_share=0.5),
    ):
        shared = plan_layouts(graph, mesh, machine, range(4), options, facts)
        assert shared == plan_layouts(graph, mesh, machine, range(4), options)
    alone = 4 * len(mesh.axes)
    assert len(made) == alone + len(mesh.axes)


def test_what_counts_of_backward_is_stated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A share of backward scales its seconds, but for what comes before the first gradient of a
    parameter, and nothing else of a problem."""
    graph, mesh, machine = mlp(), Mesh.parse("tensor=2"), cluster(2, 1e9)
    made = frames_made(monkeypatch)
    facts = GraphFacts.of(graph)
    whole = LayoutFront.of(facts, mesh, machine, range(2), LayoutOptions())
    problem, picks = whole.stated.problem, whole.fastest.picks
    found = figures(problem, picks)
    nodes = whole.stated.nodes
    later = {choice for node, choice in nodes.items() if node not in facts.first_in_backward}
    before = set(nodes.values()) - later  # equal nodes share a choice
    choices = tuple(
        choice if index in before else replace(choice, options=(Option(),) * len(choice.options))
        for index, choice in enumerate(problem.choices)
    )
    flows = tuple(flow for flow in problem.flows if flow.maker in before)
    first = figures(replace(problem, choices=choices, flows=flows), picks).backward_seconds
    assert 0.0 < first < found.backward_seconds < found.seconds
    for share in (0.25, 0.0):
        options = LayoutOptions(backward_share=share)
        front = LayoutFront.of(facts, mesh, machine, range(2), options)
        other = figures(front.stated.problem, picks)
        less = (1.0 - share) * (found.backward_seconds - first)
        assert other.seconds == pytest.approx(found.seconds - less, rel=1e-12)
        assert other.backward_seconds == pytest.approx(found.backward_seconds - less)
        assert other.step_seconds == found.step_seconds
    assert len(made) == 1


def test_equal_links_have_equal_prices() -> None:
    graph, machine, options = mlp(), cluster(4, 1e9), LayoutOptions()
    other = cluster(4, 1e8)
    facts, one, both = GraphFacts.of(graph), Mesh.parse("tensor=2"), Mesh.parse("tensor=2,data=2")
    first = pricer_of(facts, one, one, machine, (0, 1), options)
    assert pricer_of(facts, one, one, machine, (2, 3), options) is first
    assert pricer_of(facts, both, one, machine, (0, 1, 2, 3), options) is first
    assert pricer_of(facts, both, both, machine, (0, 1, 2, 3), options) is not first
    assert pricer_of(facts, one, one, other, (0, 1), options) is not first
    smaller = LayoutOptions(batch_fraction=0.25)
    assert pricer_of(facts, one, one, machine, (0, 1), smaller) is not first
