"""Plans that offload because nothing else fits, trained over real processes."""

from __future__ import annotations

import pytest

from tests.exactness.test_offload import CASES, TOLERANCE, errors, planned

from .conftest import WorkerPool

BESIDE_HOST = "tests.distributed.fakes:RankBesideHost"


@pytest.mark.parametrize(("devices", "weights", "pinned"), [c for c in CASES if c[0] == 2])
def test_planned_offloading_trains_exactly(
    pool: WorkerPool, devices: int, weights: float, pinned: dict[str, object]
) -> None:
    plan = planned(devices, weights, **pinned)
    assert plan.is_offloaded
    session = pool.session(devices, BESIDE_HOST)
    found = errors(plan, session, None)
    assert max(found.values()) <= TOLERANCE, found
    assert session.call("num_states_on_device", [{}] * devices) == [0] * devices
