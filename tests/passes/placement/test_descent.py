"""Closing the gap from both sides, with an oracle in place of a solver."""

from __future__ import annotations

import pytest

from cutset.compiler.ir.workload import DeviceKind, Operator, Workload
from cutset.passes.placement.descent import Answer, descend
from cutset.passes.placement.incumbent import Incumbent

_WORKLOAD = Workload((DeviceKind("cpu", 1),), (Operator("a", (1.0,), (0.0,)),), ())
_GAP = 1e-4


class _Oracle:
    """Answers with a placement just below the limit, if the optimum is, and counts questions.

    Args:
        hard: a limit from the optimum up to which it knows no answer.
    """

    def __init__(self, start: float, optimum: float, hard: float = 0.0) -> None:
        self.best = Incumbent(_WORKLOAD, time_limit=1000.0, gap=_GAP)
        self.best.value, self.best.placement = start, (0,)
        self.optimum, self.hard = optimum, hard
        self.limits: list[float] = []

    def ask(self, limit: float, seconds: float) -> Answer[float]:
        self.limits.append(limit)
        if self.optimum <= limit < self.hard:
            return Answer(None, none_exists=False)
        return Answer(limit if limit >= self.optimum else None, none_exists=limit < self.optimum)

    def take(self, value: float) -> bool:
        self.best.value = value
        return True

    def descend(self) -> Incumbent:
        descend(
            self.best,
            self.ask,
            self.take,
            method="oracle",
            first_aim=0.0,
            share=1.0,
            share_each=0.8,
        )
        return self.best


@pytest.mark.parametrize("optimum", [99.995, 99.3, 80.0, 51.0, 1.0])
def test_a_far_optimum_is_reached_in_few_questions(optimum: float) -> None:
    oracle = _Oracle(100.0, optimum)
    best = oracle.descend()
    assert best.bound <= optimum <= best.value
    assert best.value - best.bound <= _GAP * best.value
    assert len(oracle.limits) <= 60  # steps of the gap alone would be thousands


def test_after_bold_questions_without_answer_comes_the_smallest_one() -> None:
    oracle = _Oracle(100.0, 80.0, hard=95.0)
    best = oracle.descend()
    assert 95.0 <= best.value <= 95.0 * (1 + _GAP)  # all that the oracle tells
    assert best.bound <= 80.0


def test_a_value_that_is_optimal_is_proven_by_one_question() -> None:
    oracle = _Oracle(100.0, 100.0)
    best = oracle.descend()
    assert len(oracle.limits) == 1
    assert best.value == 100.0 and best.value - best.bound <= _GAP * best.value
