"""Probes of links move the bytes that the cost model counts of what they time."""

from __future__ import annotations

import pytest
import torch

from cutset.cost_models import make_cluster
from cutset.cost_models.exchanges import edge_bytes
from cutset.runtime import link_probes
from cutset.runtime.link_probes import LinkProbes
from tests.cost_models.test_exchanges import Counted
from tests.runtime.ranks import on_ranks


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("name", ["all_gather", "reduce_scatter", "all_to_all"])
def test_collectives_are_of_the_size_that_is_told(
    name: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds = 4
    monkeypatch.setattr(link_probes, "_BETWEEN_ROUNDS", rounds)
    ranks = tuple(range(count))
    counted = Counted(monkeypatch)
    rows = on_ranks(
        count,
        lambda end: (
            lambda: LinkProbes(end, torch.device("cpu"), 10.0, on_host=True).collective(
                name, ranks, [1 << 14]
            )
        ),
    )
    (found,) = rows[0]
    num_bytes = found.num_bytes
    assert num_bytes == pytest.approx(1 << 14, rel=0.01)
    assert len(found.times) == rounds - 2 and all(end > begin for begin, end in found.times)
    expected = edge_bytes(make_cluster("cpu-core", count), name, ranks, num_bytes)
    moved = {pair: sent // rounds for pair, sent in counted.sent.items()}
    for pair, size in expected:
        assert moved[pair] == pytest.approx(size, abs=32), pair  # ranks agree on numbers besides
