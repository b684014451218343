from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cutset.passes.layouts.problem import LayoutProblem, figures
from cutset.passes.layouts.program import relax, solve

from .brute import brute_force, legal_picks, picks_of, problems

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


@settings(max_examples=100)
@given(problems())
def test_relaxation_is_a_bound(problem: LayoutProblem) -> None:
    assert relax(problem) <= brute_force(problem) + 1e-6


@settings(max_examples=50)
@given(problems())
def test_one_after_the_other_without_those_before(problem: LayoutProblem) -> None:
    every = (figures(problem, picks) for picks in picks_of(problem))
    wanted = sorted(f.objective(problem) for f in every if f.is_legal(problem))
    forbidden: list[dict[int, int]] = []
    for best in wanted[:3]:
        solved = solve(problem, *forbidden)
        assert solved is not None
        assert dict(enumerate(solved.picks)) not in forbidden
        assert solved.objective == pytest.approx(best, abs=1e-6)
        forbidden.append(dict(enumerate(solved.picks)))


@settings(max_examples=100)
@given(problems(), st.floats(0, 200))
def test_depth_first_finds_all_that_cost_no_more(problem: LayoutProblem, most: float) -> None:
    def cost(picks: tuple[int, ...]) -> float:
        found = figures(problem, picks)
        return found.seconds + found.step_seconds

    found = set(legal_picks(problem, lambda o: o.seconds + o.step_seconds, most))
    assert found == {picks for picks in picks_of(problem) if cost(picks) <= most}


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
        pair_backward=((1.0,), (0.0,)),
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
