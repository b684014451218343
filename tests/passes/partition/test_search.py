from __future__ import annotations

import math

from hypothesis import given, settings

from cutset.passes.partition.objective import is_legal, step_seconds
from cutset.passes.partition.problem import StageProblem
from cutset.passes.partition.search import SearchLimits, search

from .brute import brute_force, problems, problems_with_sums


@settings(max_examples=220)
@given(problems())
def test_search_equals_brute_force(problem: StageProblem) -> None:
    counts = tuple(range(1, min(problem.num_devices, len(problem.units)) + 1))
    expected, _ = brute_force(problem, counts)
    solution = search(problem, counts, SearchLimits())
    if math.isinf(expected):
        assert solution.assignment is None
        return
    assert solution.assignment is not None
    assert is_legal(problem, solution.assignment)
    assert step_seconds(problem, solution.assignment) <= expected * (1 + 2e-6)
    assert solution.lower_bound <= expected * (1 + 1e-9)
    assert solution.seconds - solution.lower_bound <= 1e-5 * solution.seconds


@settings(max_examples=120)
@given(problems_with_sums())
def test_certificates_hold_where_backward_hides_sums(problem: StageProblem) -> None:
    """What is exposed of sums follows from their order; bounds know how much they are."""
    counts = tuple(range(1, min(problem.num_devices, len(problem.units)) + 1))
    expected, _ = brute_force(problem, counts)
    solution = search(problem, counts, SearchLimits())
    assert solution.lower_bound <= expected * (1 + 1e-9)
    if solution.assignment is not None:
        assert is_legal(problem, solution.assignment)
        assert solution.seconds == step_seconds(problem, solution.assignment)
        assert expected * (1 - 1e-9) <= solution.seconds <= 2 * expected
