"""A recorded step tells of the collectives inside its stages what the simulated one does."""

from __future__ import annotations

import pytest

from cutset.compiler.ir.trace import Lane
from cutset.runtime.inprocess import InProcessSession
from tests.runtime.traces import events_inside, recorded_and_simulated


@pytest.mark.parametrize(
    ("mesh", "zero"),
    [("data=2,tensor=2", 0), ("data=4", 2), ("data=4", 3), ("data=2,pipeline=2", 3)],
)
def test_events_are_called_alike(mesh: str, zero: int) -> None:
    measured, simulated = recorded_and_simulated(InProcessSession(4), mesh, zero)
    found = {(one.rank, one.lane, one.name) for one in measured}
    assert found == {(one.rank, one.lane, one.name) for one in simulated}
    assert {one.rank for one in events_inside(measured)} == set(range(4))


def test_collectives_lie_within_the_action_that_holds_them() -> None:
    measured, _ = recorded_and_simulated(InProcessSession(4), "data=4", 3)
    actions = {(one.rank, one.name): one for one in measured if one.lane is Lane.COMPUTE}
    inside = events_inside(measured)
    assert inside
    for one in inside:
        action = actions[one.rank, one.name.partition(" in ")[2]]
        assert action.begin_seconds <= one.begin_seconds <= one.end_seconds <= action.end_seconds
