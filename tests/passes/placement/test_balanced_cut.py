"""Balanced cuts, by METIS where it is installed, else against what METIS would be told."""

from __future__ import annotations

import importlib.util
import random
import sys
from pathlib import Path

import numpy as np
import pytest

from cutset.compiler.ir.workload import DeviceKind, Operator, Workload
from cutset.passes.placement.balanced_cut import balanced_cut, cut_library
from cutset.passes.placement.load_table import LoadTable
from cutset.passes.placement.problem import PlacementProblem, placement_problem

from .brute import random_workload

STAND_IN = '''
"""Puts vertices in the second part from the third on, and keeps what it was told."""
told = {}


def part_graph(num_parts, *, adjacency, eweights, vweights):
    told.update(num_parts=num_parts, adjacency=adjacency, eweights=eweights, vweights=vweights)
    return 1, [0 if v < 2 else 1 for v in range(len(adjacency))]
'''


def two_bundles() -> PlacementProblem:
    """Two times two operators that share large results, with a small one between."""
    fees = [4.0, 0.5, 4.0, 0.0]
    operators = tuple(Operator(f"v{v}", (1.0,), (fee,)) for v, fee in enumerate(fees))
    kinds = (DeviceKind("device", 2),)
    return placement_problem(Workload(kinds, operators, ((0, 1), (1, 2), (2, 3))), contiguous=False)


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "pymetis.py"
    path.write_text(STAND_IN)
    spec = importlib.util.spec_from_file_location("pymetis", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(sys.modules, "pymetis", module)


def test_metis_is_told_edges_both_ways_in_whole_weights(stand_in: None) -> None:
    assert cut_library() == "pymetis"
    assert balanced_cut(two_bundles(), [0, 1, 2, 3], [0, 1]) == [0, 0, 1, 1]
    told = sys.modules["pymetis"].told
    assert told["num_parts"] == 2
    assert told["adjacency"] == [[1], [0, 2], [1, 3], [2]]
    assert told["eweights"] == [1_000_000, 1_000_000, 125_000, 125_000, 1_000_000, 1_000_000]
    assert told["vweights"] == [250_000] * 4


def test_units_leave_devices_that_cannot_hold_them(stand_in: None) -> None:
    """The stand-in's second part is too large for any device."""
    operators = tuple(Operator(f"v{v}", (1.0,), (0.0,), size=1.0) for v in range(6))
    kinds = (DeviceKind("device", 2, memory=3.0),)
    edges = tuple((v, v + 1) for v in range(5))
    problem = placement_problem(Workload(kinds, operators, edges), contiguous=False)
    slots = balanced_cut(problem, range(6), [0, 1])
    assert slots is not None
    assert sorted(slots) == [0, 0, 0, 1, 1, 1]


def test_metis_cuts_where_little_is_passed_on() -> None:
    pytest.importorskip("pymetis")
    assert cut_library() == "pymetis"
    slots = balanced_cut(two_bundles(), [0, 1, 2, 3], [0, 1])
    assert slots in ([0, 0, 1, 1], [1, 1, 0, 0])


@pytest.mark.parametrize("library", ["pymetis", "networkx"])
@pytest.mark.parametrize("seed", range(25))
def test_cuts_are_legal_placements(
    seed: int, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if library == "pymetis":
        pytest.importorskip("pymetis")
    else:
        monkeypatch.setitem(sys.modules, "pymetis", None)
    workload = random_workload(seed, most_operators=30, most_devices=4)
    problem = placement_problem(workload, contiguous=False)
    if not np.isfinite(problem.times).any(axis=1).all():
        pytest.skip("a colour that no device supports")
    order = random.Random(seed).sample(range(problem.num_units), problem.num_units)
    slots = balanced_cut(problem, order, range(problem.num_devices))
    assert slots is None or LoadTable(problem, slots).legal
