"""A recorded step beside the simulated one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from cutset.compiler.api import plan_model
from cutset.compiler.ir.trace import Lane, TraceEvent
from cutset.compiler.parallel import Parallel, RunOptions
from cutset.cost_models import simulate
from cutset.runtime.session import Session

__all__ = ["events_inside", "recorded_and_simulated"]


def recorded_and_simulated(
    session: Session, mesh: str, zero: int
) -> tuple[tuple[TraceEvent, ...], tuple[TraceEvent, ...]]:
    """Events of one step of an MLP on four ranks: as they ran on `session`, and as predicted."""
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(4)]
    batch = (torch.randn(16, 16), torch.randn(16, 16))
    planned = plan_model(
        nn.Sequential(*layers),
        "cpu:4",
        example_inputs=batch,
        loss_fn=F.mse_loss,
        mesh=mesh,
        zero=zero,
        num_microbatches=2,
        check=False,
    )
    options = RunOptions(
        loss_fn=F.mse_loss, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1)
    )
    parallel = Parallel(planned, options, session)
    parallel.record_trace()
    parallel.train_step(*batch)
    simulated = simulate(planned.programs, cluster=planned.plan.cluster)
    return parallel.trace(), simulated.events


def events_inside(events: Sequence[TraceEvent]) -> list[TraceEvent]:
    """Those of collectives inside stages."""
    return [one for one in events if one.lane is Lane.COMMUNICATION and " over " in one.name]
