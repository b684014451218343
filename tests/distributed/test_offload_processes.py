"""Plans that offload because nothing else fits, trained over real processes."""

from __future__ import annotations

import pytest
import torch

from cutset.compiler.api import auto_partition
from cutset.compiler.measure import measure_training
from cutset.compiler.reference import relative_errors
from tests.exactness.harness import SEED, STEPS
from tests.exactness.test_offload import CASES, TOLERANCE, WEIGHT_BYTES, errors, planned, subject

from .conftest import WorkerPool

BESIDE_HOST = "tests.distributed.fakes:RankBesideHost"


PINNED = [case for case in CASES if case[0] == 2 and case[2]]  # what is chosen is one of them


@pytest.mark.parametrize(("devices", "weights", "pinned"), PINNED)
def test_planned_offloading_trains_exactly(
    pool: WorkerPool, devices: int, weights: float, pinned: dict[str, object]
) -> None:
    plan = planned(devices, weights, **pinned)
    assert plan.is_offloaded
    session = pool.session(devices, BESIDE_HOST)
    found = errors(plan, session, None)
    assert max(found.values()) <= TOLERANCE, found
    assert session.call("num_states_on_device", [{}] * devices) == [0] * devices


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_states_of_a_gpu_lie_in_its_host() -> None:
    """As exact as without, and the device never holds what it would hold of the states."""
    entry = subject()
    peaks = {}
    for offload in ("none", "optimizer"):
        with auto_partition(
            entry.model,
            [torch.device("cuda", 0)],
            example_inputs=entry.args,
            loss_fn=entry.loss_fn,
            optimizer=entry.numerics.optimizer,
            offload=offload,
            num_microbatches=2,
            seed=SEED,
            keep_gradients=True,
            timeout_seconds=120.0,
        ) as parallel:
            assert parallel.plan.is_offloaded == (offload == "optimizer")
            measured = measure_training(
                parallel, entry.args, loss_fn=entry.loss_fn, steps=STEPS, compare=True
            )
            assert parallel.plan.prediction is not None
            (need,) = parallel.plan.prediction.memory
        found = relative_errors(measured.run, entry.reference)
        assert max(error.value for error in found.values()) <= TOLERANCE, found
        (peaks[offload],) = measured.peak_memory_bytes
        kept_gradients = WEIGHT_BYTES  # for the comparison: nothing that a plan needs
        assert peaks[offload] <= need.bound_bytes + kept_gradients
    assert peaks["optimizer"] <= peaks["none"] - 1.9 * WEIGHT_BYTES
