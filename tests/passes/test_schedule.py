from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cutset.compiler.ir.errors import UsageError
from cutset.compiler.ir.graph import Mode
from cutset.compiler.ir.schedule import Action, ActionKind
from cutset.compiler.ir.verify import verify_schedule
from cutset.passes.partition.problem import in_flight_microbatches
from cutset.passes.schedule import build_schedule

ENDS = (ActionKind.BACKWARD, ActionKind.BACKWARD_WEIGHT)


def test_1f1b_alternates_after_a_warm_up() -> None:
    schedule = build_schedule(
        "1f1b", num_stages=2, num_microbatches=3, devices=(0, 1), split_backward=False
    )
    assert str(schedule).splitlines()[1:] == [
        "0: F0.0 F0.1 B0.0 F0.2 B0.1 B0.2",
        "1: F1.0 B1.0 F1.1 B1.1 F1.2 B1.2",
    ]


def test_gpipe_runs_all_forwards_first_and_splits_backwards() -> None:
    schedule = build_schedule("gpipe", num_stages=2, num_microbatches=2, devices=(0, 1))
    assert str(schedule).splitlines()[1:] == [
        "0: F0.0 F0.1 I0.0 W0.0 I0.1 W0.1",
        "1: F1.0 F1.1 I1.0 W1.0 I1.1 W1.1",
    ]


def test_inference_runs_forwards_only() -> None:
    schedule = build_schedule("forward", num_stages=2, num_microbatches=2, devices=(0, 1))
    assert str(schedule).splitlines()[1:] == ["0: F0.0 F0.1", "1: F1.0 F1.1"]


def test_ranks_are_devices_and_those_without_a_stage_are_idle() -> None:
    schedule = build_schedule("forward", num_stages=2, num_microbatches=1, devices=(3, 1))
    assert [[str(action) for action in rank] for rank in schedule.ranks] == [
        [],
        ["F1.0"],
        [],
        ["F0.0"],
    ]


def test_unknown_names_and_shared_devices_are_refused() -> None:
    with pytest.raises(UsageError, match="2f2b"):
        build_schedule("2f2b", num_stages=1, num_microbatches=1, devices=(0,))
    with pytest.raises(UsageError, match="one for each"):
        build_schedule("1f1b", num_stages=2, num_microbatches=1, devices=(0, 0))


@given(
    st.sampled_from(("1f1b", "gpipe", "forward")),
    st.integers(1, 6),
    st.integers(1, 9),
    st.booleans(),
)
def test_schedules_are_legal_and_keep_as_many_microbatches_as_planned(
    name: str, num_stages: int, num_microbatches: int, split: bool
) -> None:
    schedule = build_schedule(
        name,
        num_stages=num_stages,
        num_microbatches=num_microbatches,
        devices=tuple(range(num_stages)),
        split_backward=split,
    )
    verify_schedule(schedule, mode=Mode.INFER if name == "forward" else Mode.TRAIN)
    for stage, actions in enumerate(schedule.ranks):
        if name != "forward":
            expected = in_flight_microbatches(name, num_microbatches, num_stages, stage)
            assert most_in_flight(actions) == expected


def most_in_flight(actions: tuple[Action, ...]) -> int:
    alive = most = 0
    for action in actions:
        alive += (action.kind is ActionKind.FORWARD) - (action.kind in ENDS)
        most = max(most, alive)
    return most
