"""A sharded step is simulated with the collectives of its stages, and with sums beside backward."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cutset.compiler.api import plan_model
from cutset.compiler.ir.cluster import HANDLED, Link
from cutset.compiler.ir.program import (
    AllReduce,
    Await,
    Backward,
    BackwardWeight,
    Forward,
    Instruction,
    Program,
)
from cutset.cost_models import preset, simulate
from cutset.cost_models.links import all_reduce_seconds
from cutset.cost_models.stage_prices import StagePrices


def test_collectives_inside_stages_take_time() -> None:
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
    batch = (torch.randn(8, 64), torch.randn(8, 64))
    seconds = {}
    for mesh in ("tensor=2", "tensor=4", "data=2,pipeline=2"):
        planned = plan_model(
            model,
            "h100:4",
            example_inputs=batch,
            loss_fn=F.mse_loss,
            mesh=mesh,
            num_microbatches=2,
            check=False,
        )
        assert planned.plan.prediction is not None
        found = simulate(planned.programs, cluster=planned.plan.cluster)
        seconds[mesh] = found.step_seconds
        assert found.step_seconds >= 0.5 * planned.plan.prediction.step_seconds
    assert min(seconds.values()) > 0.0


def test_sums_are_hidden_behind_the_backward_that_completes_them() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(256, 256), nn.Tanh()) for _ in range(8)))
    batch = (torch.randn(1024, 256), torch.randn(1024, 256))
    planned = plan_model(
        model,
        "cpu:2",
        example_inputs=batch,
        loss_fn=F.mse_loss,
        mesh="data=2",
        zero=0,
        num_microbatches=1,
        check=False,
    )
    cluster = planned.plan.cluster
    sums = [item for item in planned.programs[0].instructions if isinstance(item, AllReduce)]
    sizes = {v.origin: v.type.num_bytes for v in planned.programs[0].stages[0].graph.values}
    total = sum(
        all_reduce_seconds(cluster, item.ranks, sum(sizes[name] for name in item.targets))
        for item in sums
    )

    def exposed(programs: tuple[Program, ...]) -> tuple[float, float]:
        found = simulate(programs, cluster=cluster, optimizer=planned.plan.optimizer)
        waits = (s.end_seconds - s.begin_seconds for s in found.timeline if s.kind == "sync")
        return sum(waits) / 2, found.step_seconds

    waited, seconds = exposed(planned.programs)
    assert 0.0 < waited <= 0.25 * total
    late = tuple(replace(p, instructions=_sums_last(p)) for p in planned.programs)
    # the thread that computes lays down one bucket while the one before travels
    assert exposed(late)[0] >= 0.7 * total
    assert planned.plan.prediction is not None
    assert abs(planned.plan.prediction.step_seconds / seconds - 1) <= 0.05


@pytest.mark.parametrize("zero", [2, 3])
def test_what_collectives_take_of_computation_is_in_simulation_and_formula(zero: int) -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(256, 256), nn.Tanh()) for _ in range(8)))
    batch = (torch.randn(1024, 256), torch.randn(1024, 256))
    busy, formula, taken = [], [], []
    for seconds in (1e-6, 1e-5):
        where = preset("cpu-hosts")
        own = tuple((name, Link(seconds, 1e10)) for name in HANDLED)
        where = replace(where, links=tuple(replace(rule, handling=own) for rule in where.links))
        planned = plan_model(
            model, where, example_inputs=batch, loss_fn=F.mse_loss, mesh="data=4", zero=zero,
            num_microbatches=1, check=False,
        )  # fmt: skip
        cluster, certificate = planned.plan.cluster, planned.plan.certificate
        assert certificate is not None
        found = simulate(planned.programs, cluster=cluster, optimizer=planned.plan.optimizer)
        busy.append(found.ranks[0].busy_seconds)
        formula.append(certificate.objective)
        prices = StagePrices(planned.programs, cluster, {})
        costs = [c for a in (Forward(0, 0), Backward(0, 0)) for c in prices.of(0, a)]
        taken.append(sum(entry.handling_seconds for cost in costs for entry in cost.hidden))
    assert taken[1] > taken[0] > 0.0
    assert busy[1] - busy[0] == pytest.approx(taken[1] - taken[0], rel=0.01)
    assert formula[1] - formula[0] == pytest.approx(taken[1] - taken[0], rel=0.2)


def _sums_last(program: Program) -> tuple[Instruction, ...]:
    """The instructions with all sums after backward, as if none could start within it."""
    moved = (AllReduce, Await)
    *first, last = (item for item in program.instructions if not isinstance(item, moved))
    return (*first, *(i for i in program.instructions if isinstance(i, moved)), last)


def test_ranks_of_several_types_meet_equally_often_in_each_part_of_backward() -> None:
    with torch.device("meta"):
        blocks = (nn.Sequential(nn.Linear(512, 2048), nn.GELU(), nn.Linear(2048, 512)),) * 8
        model = nn.Sequential(*blocks)
        batch = (torch.randn(4096, 512), torch.randn(4096, 512))
    planned = plan_model(
        model,
        "mixed-node",
        example_inputs=batch,
        loss_fn=F.mse_loss,
        mesh="data=2,tensor=4",
        num_microbatches=1,
        zero=0,
    )
    prices = StagePrices(planned.programs, planned.plan.cluster, {})
    counts = []
    for program in planned.programs:
        parts = (item for item in program.instructions if isinstance(item, BackwardWeight))
        counts.append(
            [
                [entry.count for entry in (*cost.exposed, *cost.hidden)]
                for part in parts
                for cost in prices.of(program.rank, part)
            ]
        )
    assert len(counts[0]) > 1 and counts[0][0]
    assert len(counts) == 8 and all(each == counts[0] for each in counts)
