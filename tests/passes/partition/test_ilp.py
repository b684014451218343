from __future__ import annotations

import math
from dataclasses import replace

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cutset.passes.partition.ilp import build, solve
from cutset.passes.partition.objective import is_legal, step_seconds
from cutset.passes.partition.problem import StageProblem
from cutset.passes.partition.windows import unit_windows

from .brute import brute_force, chain, problems


@settings(max_examples=40)
@given(problems(), st.data())
def test_the_program_by_itself_equals_brute_force(
    problem: StageProblem, data: st.DataObject
) -> None:
    most = min(problem.num_devices, len(problem.units))
    num_stages = data.draw(st.integers(1, most))
    expected, _ = brute_force(problem, (num_stages,))
    everywhere = ((0, num_stages - 1),) * len(problem.units)
    program = build(problem, num_stages, everywhere, scale_seconds=1000.0)
    outcome = solve(program, hint=None, time_limit=60.0, seed=0)
    if math.isinf(expected):
        assert outcome.status == "infeasible"
        return
    assert outcome.status == "optimal" and outcome.assignment is not None
    assert is_legal(problem, outcome.assignment)
    assert abs(step_seconds(problem, outcome.assignment) - expected) <= 1e-4
    assert outcome.bound_seconds <= expected


def test_nothing_beats_a_cutoff_below_the_optimum() -> None:
    problem = chain((1.0, 1.0, 1.0, 1.0))
    best, _ = brute_force(problem, (2,))
    windows = ((0, 1),) * 4
    program = build(problem, 2, windows, scale_seconds=best, cutoff_seconds=0.999 * best)
    assert solve(program, hint=None, time_limit=10.0, seed=0).status == "infeasible"


def test_windows_follow_from_the_work_before_and_after() -> None:
    problem = chain((1.0, 1.0, 1.0, 1.0, 1.0, 1.0), devices=3)
    assert unit_windows(problem, 3, 2.0) == ((0, 0), (0, 0), (1, 1), (1, 1), (2, 2), (2, 2))
    assert unit_windows(problem, 3, 1.9) is None
    pinned = replace(problem, stage_pins=((3, 2),))
    windows = unit_windows(pinned, 3, 3.0)
    assert windows is not None
    assert [first for first, _ in windows] == [0, 0, 0, 2, 2, 2]


@settings(max_examples=60)
@given(problems(), st.data())
def test_windows_keep_every_partition_under_the_bottleneck(
    problem: StageProblem, data: st.DataObject
) -> None:
    most = min(problem.num_devices, len(problem.units))
    num_stages = data.draw(st.integers(1, most))
    seconds, best = brute_force(problem, (num_stages,))
    assume(best is not None)
    assert best is not None
    windows = unit_windows(problem, num_stages, seconds)
    assert windows is not None
    inside = zip(windows, best.stages, strict=True)
    assert all(first <= stage <= last for (first, last), stage in inside)
