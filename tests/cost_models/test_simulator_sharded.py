"""A sharded step is simulated with the collectives of its stages."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from cutset.compiler.api import plan_model
from cutset.cost_models import simulate


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
