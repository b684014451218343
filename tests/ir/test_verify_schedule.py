"""Schedules: right ones pass, each broken one is caught."""

from __future__ import annotations

import pytest

from cutset.compiler.ir.errors import VerificationError
from cutset.compiler.ir.graph import Mode
from cutset.compiler.ir.schedule import Action, Schedule
from cutset.compiler.ir.verify import verify_schedule
from tests.ir.pipelines import one_f_one_b


def schedule(*rows: str, stages: int = 2, microbatches: int = 2) -> Schedule:
    ranks = tuple(tuple(map(Action.parse, row.split())) for row in rows)
    return Schedule("test", stages, microbatches, ranks)


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize(("stages", "microbatches"), [(1, 1), (2, 1), (3, 8), (4, 2)])
def test_1f1b_passes(stages: int, microbatches: int, split: bool, mode: Mode) -> None:
    verify_schedule(one_f_one_b(stages, microbatches, mode=mode, split=split), mode=mode)


def test_other_right_schedules_pass() -> None:
    gpipe = ("F0.0 F0.1 B0.0 B0.1", "F1.0 F1.1 B1.0 B1.1")
    verify_schedule(schedule(*gpipe), mode=Mode.TRAIN)
    late_weights = ("F0.0 F0.1 I0.0 I0.1 W0.0 W0.1", "F1.0 I1.0 F1.1 I1.1 W1.0 W1.1", "")
    verify_schedule(schedule(*late_weights), mode=Mode.TRAIN)
    two_on_one = ("F0.0 F1.0 F0.1 F1.1 B1.0 B0.0 B1.1 B0.1",)
    verify_schedule(schedule(*two_on_one), mode=Mode.TRAIN)


FIRST = "F0.0 F0.1 B0.0 B0.1"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ((FIRST, "F1.0 F1.1 B1.0"), "B1.1) is not scheduled"),
        ((FIRST, "F1.0 F1.1 I1.0 I1.1 W1.0"), "W1.1 is not scheduled"),
        ((FIRST, "F1.0 B1.0 B1.1"), "F1.1 is not scheduled"),
        ((FIRST, "F1.0 F1.1 B1.0 B1.1 B1.1"), "the action is scheduled twice"),
        ((FIRST, "F1.0 F1.1 B1.0 B1.1 W1.1"), "B1.1 is scheduled beside one of its halves"),
        ((FIRST, "F1.0 F1.1 W1.0 I1.0 B1.1"), "W1.0 comes before I1.0"),
        ((FIRST, "F1.0 B1.0 B1.1 F1.1"), "B1.1 comes before F1.1"),
        ((FIRST, "F1.1 F1.0 B1.0 B1.1"), "it comes after microbatch 1; microbatches ascend"),
        ((FIRST, "F1.0 F1.1 B1.1 B1.0"), "it comes after microbatch 1; microbatches ascend"),
        ((FIRST, "F1.0 F1.1 B1.0", "B1.1"), "stage 1 already runs on rank 1"),
        ((FIRST, "F1.0 F1.1 B1.0 B1.1 F2.0"), "there is no such stage"),
        ((FIRST, "F1.0 F1.1 B1.0 B1.1 F1.2"), "there is no such microbatch"),
    ],
)
def test_broken_schedules_are_caught(rows: tuple[str, ...], message: str) -> None:
    with pytest.raises(VerificationError) as caught:
        verify_schedule(schedule(*rows), mode=Mode.TRAIN)
    assert message in caught.value.cause


def test_no_backward_to_infer() -> None:
    with pytest.raises(VerificationError, match="an inference runs backward"):
        verify_schedule(schedule(FIRST, "F1.0 F1.1 B1.0 B1.1"), mode=Mode.INFER)


def test_empty_schedules_are_caught() -> None:
    with pytest.raises(VerificationError, match="no stages"):
        verify_schedule(schedule(stages=0), mode=Mode.INFER)
    with pytest.raises(VerificationError, match="no microbatches"):
        verify_schedule(schedule(microbatches=0), mode=Mode.INFER)


def test_a_deadlock_prints_its_cycle() -> None:
    waiting = schedule("F0.0 B0.0 F0.1 B0.1", "F1.0 F1.1 B1.0 B1.1")
    with pytest.raises(VerificationError) as caught:
        verify_schedule(waiting, mode=Mode.TRAIN)
    assert caught.value.cause == (
        "the schedule deadlocks: rank 0 at B0.0 waits for B1.0 of rank 1; "
        "rank 1 at F1.1 waits for F0.1 of rank 0"
    )


def test_independent_stages_need_no_order() -> None:
    apart = schedule("F0.0 F2.0 F0.1 F2.1", "F1.0 F1.1", stages=3)
    backwards = schedule("F2.0 F2.1 F0.0 F0.1", "F1.0 F1.1", stages=3)
    verify_schedule(apart, mode=Mode.INFER)
    verify_schedule(backwards, mode=Mode.INFER, edges=((0, 1),))
    with pytest.raises(VerificationError, match="deadlock"):
        verify_schedule(backwards, mode=Mode.INFER)
