"""Checkpoints and weights over real processes: workers, ranks of torchrun, their memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.materialise import LAYER_MIB, MIB, measure, parallel_on, plan, sources
from cutset.compiler import checkpoint
from cutset.compiler.ir.errors import RuntimeFailure
from tests.compiler.partitioned import Plain, assert_same, batch, chain, partition, train_both

from .conftest import WorkerPool
from .test_spmd import torchrun


def _adam(parameters: object) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-2)  # type: ignore[arg-type]


def test_a_run_moves_between_processes_and_plans_by_checkpoints(
    pool: WorkerPool, tmp_path: Path
) -> None:
    batches = [batch(seed=seed) for seed in range(2)]
    plain = Plain(chain(0.3), _adam)
    first = partition(chain(0.3), optimizer=_adam, session=pool.session(2))
    train_both(first, plain, batches)
    first.save_checkpoint(tmp_path / "1")
    second = partition(chain(0.3).to("meta"), optimizer=_adam, stages=3)
    second.load_checkpoint(tmp_path / "1")
    train_both(second, plain, batches)
    second.save_checkpoint(tmp_path / "2")
    first.load_checkpoint(tmp_path / "2")
    train_both(first, plain, batches)


def test_workers_survive_a_save_that_fails(
    pool: WorkerPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a folder goes after it was looked for."""
    monkeypatch.setattr(checkpoint, "refuse_existing", lambda target: None)
    (tmp_path / "file").touch()
    parallel = partition(chain(), session=pool.session(2))
    parallel.train_step(*batch())
    with pytest.raises(RuntimeFailure, match="cannot be written: NotADirectoryError"):
        parallel.save_checkpoint(tmp_path / "file" / "c")
    parallel.train_step(*batch())


def test_under_torchrun(tmp_path: Path) -> None:
    source = f"""
from tests.compiler.partitioned import *
folder = {str(tmp_path)!r}
def run(model, **options):
    return auto_partition(model, 2, example_inputs=batch(), num_stages=2, num_microbatches=2,
        loss_fn=F.mse_loss, check=False, timeout_seconds=60.0, **options)
first = run(chain(0.3))
first.train_step(*batch())
first.save_checkpoint(folder + "/1")
losses = [float(first.train_step(*batch(seed=seed))) for seed in range(2)]
first.close()
second = run(chain(0.3).to("meta"), weights=lambda name, t: torch.ones(t.shape))
second.load_checkpoint(folder + "/1")
assert losses == [float(second.train_step(*batch(seed=seed))) for seed in range(2)]
second.save_checkpoint(folder + "/2")
second.close()
tell("finished")
"""
    with torchrun(source, tmp_path) as job:
        output, errors = job.communicate(timeout=150)
    assert job.returncode == 0, errors
    assert output.split() == ["finished"] * 2
    plain = Plain(chain(0.3))
    for seed in (0, 0, 1):
        plain.step(*batch(seed=seed))
    parallel = partition(chain(0.3), stages=3)
    parallel.load_checkpoint(tmp_path / "2")
    assert_same(parallel.state_dict(), plain.model.state_dict())


@pytest.mark.parametrize("kind", ["function", "safetensors"])
def test_no_process_holds_more_than_its_share_and_a_tensor(
    kind: str, pool: WorkerPool, tmp_path: Path
) -> None:
    """256 MiB over four workers; besides, a mapped file may count up to 16 MiB."""
    depth = 256 // LAYER_MIB
    parallel = parallel_on(plan(depth, 4), sources(depth, tmp_path)[kind], pool.session(4))
    _ = parallel._ranks.session  # starting is not measured
    found = measure(parallel.place, pool.session(4))
    assert found["share_bytes"] == 64 * MIB
    assert found["worker_bytes"] < found["share_bytes"] + (LAYER_MIB + 16 + 20) * MIB
    assert found["driver_bytes"] < found["share_bytes"]
    pool.session(4).call("reset")
