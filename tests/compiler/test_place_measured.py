"""Placing by times that change where operators run: with workers that are made up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    """Every node takes a millisecond; once it is placed, `factor` times that on `near`, and where
    `slow` says so five times that everywhere."""

    def __init__(
        self, graph: Graph, factor: float, slow: Callable[[Plan], bool] = lambda plan: False
    ) -> None:
        self._row = (1e-3,) * len(graph.nodes)
        self._factor, self._slow = factor, slow
        self.asked: list[list[Plan]] = []

    def everywhere(self) -> Measured:
        return Measured({"near": self._row, "far": self._row}, FREE)

    def in_place(self, plans: Sequence[Plan]) -> list[Measured]:
        self.asked.append(list(plans))
        return [self._measured(5.0 if self._slow(plan) else 1.0) for plan in plans]

    def _measured(self, factor: float) -> Measured:
        near, far = (
            tuple(factor * own * seconds for seconds in self._row) for own in (self._factor, 1.0)
        )
        return replace(self.everywhere(), nodes={"near": near, "far": far})


def placed(graph: Graph, workers: Workers, objective: Objective) -> tuple[Plan, Measured]:
    options = PlanOptions(objective=objective, num_microbatches=4, placement_seconds=4.0)
    search: Callable[[PlanOptions], Plan] = lambda now: plan_graph(  # noqa: E731
        graph, CLUSTER, batch_size=8, options=now
    )
    return place_measured(graph, options, workers, search, lambda line: None)


def loads(plan: Plan) -> list[float]:
    assert plan.prediction is not None
    return [load.total_seconds for load in plan.prediction.loads]


def work(plan: Plan) -> list[int]:
    """Numbers of nodes on the devices."""
    return [sum(len(s.nodes) for s in plan.stages if s.device == device) for device in (0, 1)]


def test_operators_move_where_they_turn_out_to_be_faster() -> None:
    graph = chain()
    workers = Workers(graph, factor=3.0)
    plan, measured = placed(graph, workers, Objective.THROUGHPUT)
    assert work(workers.asked[0][0]) == [4, 4]
    assert loads(plan) == pytest.approx([6e-3, 6e-3])
    assert measured.nodes["near"][0] == pytest.approx(3e-3)
    certificate = plan.certificate
    assert certificate is not None
    assert certificate.objective == pytest.approx(6e-3)
    assert 5e-3 < certificate.lower_bound <= certificate.objective
    assert certificate.gap == pytest.approx(1.0 - certificate.lower_bound / certificate.objective)


def test_what_is_hardly_better_ends_the_search() -> None:
    graph = chain()
    workers = Workers(graph, factor=1.01)
    plan, _ = placed(graph, workers, Objective.THROUGHPUT)
    assert len(workers.asked) == 2, "one round in place, and all placements in turns"
    assert max(loads(plan)) == pytest.approx(4.04e-3)


def test_equal_numbers_of_operators_stay_where_all_else_turns_out_slow() -> None:
    graph = chain()
    workers = Workers(graph, factor=2.0, slow=lambda plan: work(plan) != [4, 4])
    plan, measured = placed(graph, workers, Objective.THROUGHPUT)
    assert any(work(other) != [4, 4] for other in workers.asked[-1])
    assert work(plan) == [4, 4]
    assert max(loads(plan)) == pytest.approx(8e-3)
    assert measured.nodes["near"][0] == pytest.approx(2e-3)
    assert plan.certificate is not None
    assert 0.2 < plan.certificate.gap < 1.0, "3 nodes of 2 ms and 5 of 1 ms would have been better"


def test_placements_are_compared_by_times_of_the_same_turns() -> None:
    """The placement of the first round was measured in a slow moment; in turns it is as good."""
    graph = chain()

    class Slow(Workers):
        def in_place(self, plans: Sequence[Plan]) -> list[Measured]:
            found = super().in_place(plans)
            return found if len(self.asked) > 1 else [self._measured(1.5) for _ in plans]

    workers = Slow(graph, factor=1.0)
    plan, _ = placed(graph, workers, Objective.THROUGHPUT)
    assert max(loads(plan)) == pytest.approx(4e-3)
    assert len({other.stages for other in workers.asked[-1]}) == len(workers.asked[-1])


def test_for_one_sample_nothing_is_measured_again() -> None:
    graph = chain()
    workers = Workers(graph, factor=3.0)
    plan, _ = placed(graph, workers, Objective.LATENCY)
    assert workers.asked == []
    assert sum(loads(plan)) == pytest.approx(8e-3)
