from __future__ import annotations

import math
from dataclasses import replace

from hypothesis import given, settings

from cutset.passes.partition.objective import is_legal, step_seconds
from cutset.passes.partition.problem import StageProblem, Unit
from cutset.passes.partition.search import SearchLimits, search

from .brute import brute_force, chain, problems, problems_with_sums


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


def test_what_is_not_looked_for_is_not_proven() -> None:
    """With a coarse tolerance a partition that is better by less may be left, and the bound says
    so."""
    units = tuple(
        Unit(f"u{i}", (s / 2,), (s / 2,)) for i, s in enumerate((2.0, 3.0, 2.0, 3.0, 2.0))
    )
    problem = replace(chain((1.0,)), units=units, flows=())
    best, _ = brute_force(problem, (2,))
    limits = SearchLimits(tolerance=0.15, num_orders=1, max_down_sets=3)
    solution = search(problem, (2,), limits)
    assert best < solution.seconds < best / (1 - 0.15)
    assert best * (1 - 0.15) <= solution.lower_bound <= best


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
