"""Placing by times that change where operators run: with workers that are made up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

from cutset.compiler.ir.cluster import Link
from cutset.compiler.ir.graph import Graph, Mode
from cutset.compiler.ir.plan import Objective, Plan
from cutset.compiler.place_measured import place_measured
from cutset.compiler.planning import Planning
from cutset.passes.context import Measured, PlanOptions
from cutset.passes.pipeline import plan_graph
from tests.exactness.placed import cpu_type, cpu_workers

CLUSTER = cpu_workers(cpu_type("near"), cpu_type("far"))
FREE = {name: Link(0.0, float("inf")) for name in ("near", "far")}


def chain() -> Graph:
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(8)))
    call = ((torch.randn(8, 8),), {})
    planning = Planning(model, call, CLUSTER, Mode.INFER, None, False, lambda line: None)
    return planning.captured(4).graph


class Workers:
    """Every node takes a millisecond; once it is placed, `factor` times that on `near`."""

    def __init__(self, graph: Graph, factor: float) -> None:
        self._row = (1e-3,) * len(graph.nodes)
        self._factor = factor
        self.asked: list[Plan] = []

    def everywhere(self) -> Measured:
        return Measured({"near": self._row, "far": self._row}, FREE)

    def in_place(self, plan: Plan) -> Measured:
        self.asked.append(plan)
        slow = tuple(self._factor * seconds for seconds in self._row)
        return replace(self.everywhere(), nodes={"near": slow, "far": self._row})


def placed(graph: Graph, workers: Workers, objective: Objective) -> tuple[Plan, Measured]:
    options = PlanOptions(objective=objective, num_microbatches=4, placement_seconds=4.0)
    search: Callable[[PlanOptions], Plan] = lambda now: plan_graph(  # noqa: E731
        graph, CLUSTER, batch_size=8, options=now
    )
    return place_measured(graph, options, workers, search, lambda line: None)


def loads(plan: Plan) -> list[float]:
    assert plan.prediction is not None
    return [load.total_seconds for load in plan.prediction.loads]


def test_operators_move_where_they_turn_out_to_be_faster() -> None:
    graph = chain()
    workers = Workers(graph, factor=3.0)
    plan, measured = placed(graph, workers, Objective.THROUGHPUT)
    assert loads(workers.asked[0]) == pytest.approx([4e-3, 4e-3])
    assert loads(plan) == pytest.approx([6e-3, 6e-3])
    assert measured.nodes["near"][0] == pytest.approx(3e-3)
    assert len(workers.asked) == 2, "the second placement was measured, and nothing was better"
    certificate = plan.certificate
    assert certificate is not None
    assert certificate.objective == pytest.approx(6e-3)
    assert 5e-3 < certificate.lower_bound <= certificate.objective
    assert certificate.gap == pytest.approx(1.0 - certificate.lower_bound / certificate.objective)


def test_what_is_hardly_better_is_not_taken_but_priced_by_the_new_times() -> None:
    graph = chain()
    workers = Workers(graph, factor=1.01)
    plan, _ = placed(graph, workers, Objective.THROUGHPUT)
    assert len(workers.asked) == 1
    assert plan.stages == workers.asked[0].stages
    assert max(loads(plan)) == pytest.approx(4.04e-3)


def test_for_one_sample_nothing_is_measured_again() -> None:
    graph = chain()
    workers = Workers(graph, factor=3.0)
    plan, _ = placed(graph, workers, Objective.LATENCY)
    assert workers.asked == []
    assert sum(loads(plan)) == pytest.approx(8e-3)
