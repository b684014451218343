"""The next best layouts: of all that there are, and of a plan's own problem."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings

from cutset.compiler.ir.graph import Graph
from cutset.compiler.ir.mesh import Mesh
from cutset.compiler.ir.plan import Plan
from cutset.compiler.sharding.sharding import Sharding
from cutset.passes.context import PlanOptions
from cutset.passes.layouts.problem import LayoutProblem, figures
from cutset.passes.layouts.program import solve
from cutset.passes.layouts.runner_up import PlannedLayouts, planned_layouts
from cutset.passes.pipeline import plan_graph

from .brute import graphs, picks_of, problems
from .test_choose import cluster

_TOLERANCE = 1.1e-3


def least(problem: LayoutProblem, forbidden: Mapping[int, int]) -> float:
    """The least objective of legal picks that differ from `forbidden` somewhere."""
    found = (
        figures(problem, picks)
        for picks in picks_of(problem)
        if any(picks[choice] != option for choice, option in forbidden.items())
    )
    legal = (entry.objective(problem) for entry in found if entry.is_legal(problem))
    return min(legal, default=math.inf)


@settings(max_examples=200)
@given(problems())
def test_the_cut_leaves_the_best_of_the_others(problem: LayoutProblem) -> None:
    problem = replace(problem, seconds_per_byte=0.0)  # where bytes are priced nothing branches
    solved = solve(problem)
    assume(solved is not None)
    assert solved is not None
    forbidden = dict(enumerate(solved.picks))
    wanted, found = least(problem, forbidden), solve(problem, forbidden)
    if found is None:
        assert math.isinf(wanted)
        return
    assert found.picks != solved.picks
    assert found.objective == pytest.approx(wanted, rel=_TOLERANCE, abs=1e-6)


def planned(graph: Graph) -> tuple[Plan, PlannedLayouts]:
    options = PlanOptions(mesh=Mesh.parse("tensor=2"), num_microbatches=1)
    plan = plan_graph(graph, cluster(2, 1e9), batch_size=8, options=options)
    layouts = planned_layouts(plan, graph, (0, 1))
    assert layouts is not None
    return plan, layouts


@settings(max_examples=8)
@given(graphs(most_nodes=4))
def test_a_plan_is_read_back_as_picks(graph: Graph) -> None:
    plan, layouts = planned(graph)
    decided = layouts.stated.decode(layouts.picks)
    sharding = Sharding.of(plan, graph)
    for node in graph.nodes:
        (strategy,) = decided.strategies[node.id]
        known = sharding.node_strategies(node)
        assert strategy.is_replicated if known is None else (strategy,) == known
    for value, placements in decided.held.items():
        assert not placements or placements == sharding.layout(graph.values[value]).placements


@settings(max_examples=15)
@given(graphs(most_nodes=3))
def test_the_runner_up_of_a_whole_graph_is_the_best_of_all_others(graph: Graph) -> None:
    _, layouts = planned(graph)
    problem = layouts.stated.problem
    assume(math.prod(len(choice.options) for choice in problem.choices) <= 3_000)
    everything = tuple(range(len(graph.nodes)))
    part = layouts._choices(everything)
    assume(len(part) > 1)
    found = layouts.runner_up(everything)
    told_apart = layouts._told_apart(everything, part)
    fixed = [c for c in range(len(problem.choices)) if c not in part]
    rows = (
        figures(problem, picks)
        for picks in picks_of(problem)
        if all(picks[c] == layouts.picks[c] for c in fixed)
        and any(picks[c] != layouts.picks[c] for c in told_apart)
    )
    wanted = min(
        (entry.objective(problem) for entry in rows if entry.is_legal(problem)), default=math.inf
    )
    if found is None:
        assert math.isinf(wanted)
        return
    before = figures(problem, layouts.picks).objective(problem)
    more = found.seconds + found.step_seconds / problem.num_microbatches
    assert before + more == pytest.approx(wanted, rel=_TOLERANCE)
    assert found.changes
