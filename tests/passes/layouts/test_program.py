from __future__ import annotations

import math

import pytest
from hypothesis import given, settings

from cutset.passes.layouts.problem import LayoutProblem, figures
from cutset.passes.layouts.program import solve

from .brute import brute_force, problems

_TOLERANCE = 1.1e-3  # of the solver's gap, where it branches


@settings(max_examples=200)
@given(problems())
def test_optimum_is_that_of_enumeration(problem: LayoutProblem) -> None:
    best = brute_force(problem)
    solved = solve(problem)
    if solved is None:
        assert math.isinf(best)
        return
    found = figures(problem, solved.picks)
    assert found.is_legal(problem)
    assert solved.objective == found.objective(problem)
    slack = 1e-6 if solved.statistics.relaxation_integral else _TOLERANCE * abs(best) + 1e-6
    assert best - 1e-6 <= solved.objective <= best + slack
    assert solved.lower_bound <= best + 1e-6


@settings(max_examples=50)
@given(problems())
def test_same_problem_same_picks(problem: LayoutProblem) -> None:
    assert solve(problem) == solve(problem)


def test_shared_conversion_is_paid_once() -> None:
    from cutset.passes.layouts.problem import Choice, Flow, Option, Use

    choices = (Choice("maker", (Option(), Option(3.0))), *(Choice(n, (Option(),)) for n in "ab"))
    flow = Flow(
        name="value",
        maker=0,
        states=(0, 1),
        uses=(Use(1, (0,)), Use(2, (0,))),
        pair_seconds=((2.0,), (0.0,)),
        conversions=(0,),
        use_seconds=(0.0,),
        made_seconds=(0.0, 0.0),
        kept=((-1,), (-1,)),
        own_kept=(-1, -1),
        tensor_bytes=(),
        family=0,
    )
    solved = solve(LayoutProblem(choices, (flow,)))
    assert solved is not None
    assert solved.picks == (0, 0, 0)  # 2 once, not 2 twice, which 3 would beat
    assert solved.objective == pytest.approx(2.0)
