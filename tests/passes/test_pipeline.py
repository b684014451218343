from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from cutset.compiler.ir.errors import VerificationError
from cutset.compiler.ir.graph import Graph
from cutset.compiler.ir.mesh import Mesh
from cutset.compiler.ir.plan import Plan
from cutset.compiler.ir.verify import verify_plan
from cutset.compiler.sharding.localize import LocalPart
from cutset.compiler.sharding.sharding import Sharding
from cutset.cost_models.presets import local_cpu_cluster
from cutset.passes import columns
from cutset.passes.context import Context, PlanOptions
from cutset.passes.pipeline import PASSES, plan_graph, run_passes
from tests.ir.builders import mlp, residual, tied_embedding

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class LoseANode:
    """A pass with a bug."""

    name: str = "lose a node"

    def run(self, plan: Plan, context: Context) -> Plan:
        first, *others = plan.stages
        return replace(plan, stages=(replace(first, nodes=first.nodes[1:]), *others))


def test_every_decision_is_made_and_the_plan_is_legal() -> None:
    for graph in (mlp(), residual(), tied_embedding()):
        plan = plan_graph(graph, local_cpu_cluster(3), batch_size=8)
        verify_plan(plan, graph)
        assert plan.schedule is not None
        assert plan.prediction is not None and plan.certificate is not None
        assert plan.num_microbatches in (1, 2, 4, 8)
        assert 0.0 < plan.certificate.lower_bound <= plan.certificate.objective
        assert plan.prediction.step_seconds == plan.certificate.objective
        stages = plan_graph(
            graph, local_cpu_cluster(3), batch_size=8, options=PlanOptions(num_stages=2)
        )
        assert stages.certificate is not None and stages.certificate.gap <= 0.01


def test_passes_share_local_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []
    plain = columns.localize

    def counted(graph: Graph, sharding: Sharding, coordinate: tuple[int, ...]) -> LocalPart:
        made.append((sharding.mesh, sharding.strategies, sharding.layouts))
        return plain(graph, sharding, coordinate)

    monkeypatch.setattr(columns, "localize", counted)
    options = PlanOptions(mesh=Mesh.parse("tensor=2"))
    plan_graph(mlp(), local_cpu_cluster(2), batch_size=8, options=options)
    assert made and all(made.count(item) == 1 for item in made)


def test_an_illegal_plan_is_blamed_on_the_pass_that_made_it() -> None:
    graph = mlp()
    options = PlanOptions(num_stages=2, num_microbatches=2)
    plan = plan_graph(graph, local_cpu_cluster(2), batch_size=4, options=options)
    with pytest.raises(VerificationError, match="pass 'lose a node' made an illegal plan"):
        run_passes(plan, Context(graph, options), (LoseANode(),))


def test_passes_report_their_progress() -> None:
    lines: list[str] = []
    plan_graph(mlp(), local_cpu_cluster(2), batch_size=4, progress=lines.append)
    assert [line for line in lines if line.startswith("pass ")] == [
        f"pass {entry.name}" for entry in PASSES
    ]


PRINT_PLAN = """
from dataclasses import replace
from cutset.compiler.ir.text import print_plan
from cutset.cost_models.presets import preset
from cutset.passes.pipeline import PlanOptions, plan_graph
from tests.ir.builders import residual
options = PlanOptions(num_stages=3)
plan = plan_graph(residual(6), preset("mixed-node"), batch_size=8, options=options)
print(print_plan(replace(plan, certificate=replace(plan.certificate, solver_seconds=0.0))))
"""


def test_plans_are_identical_under_any_hash_seed() -> None:
    printed = {
        subprocess.run(
            [sys.executable, "-c", PRINT_PLAN],
            env={**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(printed) == 1
    assert "stage" in printed.pop()
