"""Runs of units with prices of their own for each stage, against enumeration."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from cutset.passes.partition.runs import Table, best_runs

Runs = tuple[tuple[int, int], ...]


def tables_of(seed: int, stages: int, units: int) -> list[tuple[Table, Table]]:
    """Sums of random figures of units; the first of a run adds what crosses there."""
    source = np.random.default_rng(seed)

    def by_run(top: float) -> Table:
        total = np.concatenate([[0.0], source.uniform(0.0, top, units).cumsum()])
        return np.asarray(total[None, :] - total[:, None])

    crossing = np.concatenate([source.uniform(0.0, 0.5, units), [0.0]])[:, None]
    return [(by_run(1.0) + crossing, by_run(3.0)) for _ in range(stages)]


def step(tables: list[tuple[Table, Table]], runs: Runs) -> float:
    pairs = list(zip(tables, runs, strict=True))
    return float(sum(f[run] for (f, _), run in pairs) + max(v[run] for (_, v), run in pairs))


def all_runs(stages: int, units: int) -> list[Runs]:
    cuts = itertools.combinations(range(1, units), stages - 1)
    return [tuple(itertools.pairwise((0, *cut, units))) for cut in cuts]


@pytest.mark.parametrize("seed", range(40))
def test_best_runs_are_those_of_enumeration(seed: int) -> None:
    stages, units = 1 + seed % 4, 5 + seed % 3
    tables = tables_of(seed, stages, units)
    source = np.random.default_rng(seed + 100)
    forbidden = []
    for _ in range(seed % 3):
        first, last = sorted(source.choice(units + 1, 2, replace=False))
        forbidden.append((int(source.integers(stages)), int(first), int(last)))

    def is_allowed(runs: Runs) -> bool:
        return not any(runs[s][0] <= a and runs[s][1] >= b for s, a, b in forbidden)

    legal = [runs for runs in all_runs(stages, units) if is_allowed(runs)]
    found = best_runs(tables, forbidden)
    if not legal:
        assert found is None
        return
    assert found in legal
    least = min(step(tables, runs) for runs in legal)
    assert math.isclose(step(tables, found), least, rel_tol=1e-12)


def test_more_stages_than_units_have_no_runs() -> None:
    assert best_runs(tables_of(0, 4, 3)) is None
