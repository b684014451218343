"""Layouts for less and less memory, and what is surely held."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from cutset.compiler.ir.graph import Graph
from cutset.compiler.ir.mesh import Mesh
from cutset.compiler.sharding.localize import localize
from cutset.compiler.sharding.sharding import make_sharding
from cutset.cost_models.memory import stage_memory
from cutset.passes.layouts.choose import LayoutChoice, LayoutFront, Memory
from cutset.passes.layouts.facts import GraphFacts
from cutset.passes.layouts.statement import LayoutOptions
from tests.ir.builders import mlp

from .brute import graphs
from .test_choose import cluster

_RUNGS = 6
_SPEEDS = st.sampled_from((1e7, 1e9, 1e11))


def front(graph: Graph, parts: int, speed: float) -> LayoutFront:
    mesh = Mesh.parse(f"tensor={parts}")
    machine = cluster(parts, speed)
    return LayoutFront.of(GraphFacts.of(graph), mesh, machine, range(parts), LayoutOptions())


def need(choice: LayoutChoice) -> int:
    return choice.static_bytes + choice.saved_bytes + choice.transient_bytes


@settings(max_examples=30)
@given(graphs(most_nodes=3), st.integers(2, 4), _SPEEDS)
def test_less_memory_takes_more_time(graph: Graph, parts: int, speed: float) -> None:
    entry = front(graph, parts, speed)
    before = entry.within(Memory())
    assert before is not None
    for _ in range(_RUNGS):
        memory = Memory(int(0.99 * need(before)))
        choice = entry.within(memory)
        if choice is None:
            return
        assert need(choice) <= need(before)
        assert choice.objective >= before.objective * (1 - 1e-9)
        assert entry.lower_bound(memory) <= choice.objective * (1 + 1e-9)
        before = choice


@settings(max_examples=30)
@given(graphs(most_nodes=3), st.integers(2, 4), _SPEEDS)
def test_others_come_in_order(graph: Graph, parts: int, speed: float) -> None:
    entry = front(graph, parts, speed)
    known: list[LayoutChoice] = []
    for _ in range(3):
        choice = entry.within(Memory(), known)
        if choice is None:
            return
        assert choice.picks not in {item.picks for item in known}
        assert not known or choice.objective >= known[-1].objective * (1 - 1e-9)
        known.append(choice)


@st.composite
def memories(draw: st.DrawFn) -> Memory:
    """In which some layouts of a small graph fit, or none."""
    share = st.sampled_from((0.25, 0.5, 1.0))
    limit = draw(st.sampled_from((0, 16, 256, 4096, None)))
    return Memory(limit, 2.0 * draw(share), draw(share), draw(share))


@settings(max_examples=60)
@given(graphs(most_nodes=3), st.integers(2, 4), memories(), memories())
def test_bounds_are_no_lower_within_less_memory(
    graph: Graph, parts: int, less: Memory, more: Memory
) -> None:
    entry = front(graph, parts, 1e9)
    low, high = entry.lower_bound(more), entry.lower_bound(less)
    assert less.is_within(less)
    if less.is_within(more):
        assert high >= low * (1 - 1e-9)
    elif more.is_within(less):
        assert low >= high * (1 - 1e-9)


@settings(max_examples=60)
@given(graphs(), st.integers(2, 4), _SPEEDS)
def test_a_stage_holds_what_the_bound_counts(graph: Graph, parts: int, speed: float) -> None:
    choice = front(graph, parts, speed).within(Memory())
    assert choice is not None
    sharding = make_sharding(
        graph, choice.mesh, choice.node_layouts, choice.layouts, choice.parameter_layouts
    )
    local = localize(graph, sharding, (0,)).graph
    found = stage_memory(
        local,
        range(len(local.nodes)),
        in_flight=1,
        optimizer=LayoutOptions().optimizer,
        backend="cuda",
    )
    assert choice.static_bytes + choice.saved_bytes <= found.total_bytes


def test_shares_of_what_is_held() -> None:
    entry = front(mlp(), 2, 1e9)
    whole = entry.within(Memory())
    assert whole is not None
    some = entry.within(Memory(trained_share=0.5, input_share=0.0))
    assert some is not None
    assert some.picks == whole.picks
    assert some.static_bytes < whole.static_bytes
