"""How long a search may take when nobody says."""

from __future__ import annotations

import pytest

from cutset.compiler.ir.workload import DeviceKind, Operator, Workload
from cutset.passes.placement.methods import usual_seconds


def _graph(operators: int, devices: int) -> Workload:
    one = tuple(Operator(f"op{v}", (1.0,), (0.0,)) for v in range(operators))
    return Workload((DeviceKind("gpu", devices),), one, ())


@pytest.mark.parametrize(
    ("operators", "devices", "limit"),
    [(1000, 16, 10), (1000, 64, 10), (5000, 16, 30), (5000, 64, 30), (20000, 64, 120)],
)
def test_large_graphs_are_placed_well_within_their_limits(
    operators: int, devices: int, limit: float
) -> None:
    assert usual_seconds(_graph(operators, devices)) <= 0.85 * limit


def test_graphs_that_programs_may_prove_have_a_minute() -> None:
    assert usual_seconds(_graph(2000, 7)) == usual_seconds(_graph(30, 3)) == 55.0
