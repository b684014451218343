"""A partitioned model over real processes: workers started by the call, state that travels."""

from __future__ import annotations

import torch
from torch.nn import functional as F
from torch.optim import lr_scheduler

from cutset.compiler.api import auto_partition
from tests.compiler.partitioned import Plain, assert_same, batch, chain, partition, train_both

from .conftest import WorkerPool


def _adam(parameters: object) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-2, amsgrad=True)  # type: ignore[arg-type]


def test_training_moves_from_processes_to_another_plan(pool: WorkerPool) -> None:
    batches = [batch(seed=seed) for seed in range(3)]
    first = partition(chain(0.3), optimizer=_adam, session=pool.session(2), keep_gradients=True)
    plain = Plain(chain(0.3), _adam)
    schedulers = [lr_scheduler.StepLR(o, 1, 0.5) for o in (first.optimizer, plain.optimizer)]
    train_both(first, plain, batches)
    assert_same(first.gradients(), plain.gradients())
    for scheduler in schedulers:
        scheduler.step()
    second = partition(chain(0.3), optimizer=_adam, stages=3)
    second.load_state_dict(first.state_dict())
    second.load_optimizer_state_dict(first.optimizer_state_dict())
    train_both(second, plain, batches)
    first.load_state_dict(second.state_dict())
    first.load_optimizer_state_dict(second.optimizer_state_dict())
    train_both(first, plain, batches[:1])


def test_fewer_workers_than_devices_where_one_is_faster() -> None:
    """The workers that started early are not the ones that the plan wants."""
    inputs = batch(rows=1)
    with auto_partition(
        chain(), 2, example_inputs=inputs, loss_fn=F.mse_loss, timeout_seconds=30.0
    ) as parallel:
        assert len(parallel.plan.stages) == 1
        plain = Plain(chain(), rows=1)
        train_both(parallel, plain, [inputs])
        assert parallel._ranks.session.num_ranks == 1
