"""Probes of links move the bytes that the cost model counts of what they time."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cutset.cost_models import make_cluster
from cutset.cost_models.exchanges import edge_bytes
from cutset.runtime import link_probes
from cutset.runtime.communicator import Communicator
from cutset.runtime.link_probes import LinkProbes
from tests.cost_models.test_exchanges import Counted
from tests.runtime.ranks import on_ranks


def test_others_compute_while_two_ranks_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways between ranks 0 and 1; rank 2 multiplies until they are done."""
    monkeypatch.setattr(link_probes, "_BETWEEN_ROUNDS", 4)
    multiplied: Counter[str] = Counter()
    multiply = link_probes._multiply

    def counted(matrix: Tensor, times: int) -> None:
        multiplied[threading.current_thread().name] += times
        multiply(matrix, times)

    monkeypatch.setattr(link_probes, "_multiply", counted)

    def body(end: Communicator) -> Callable[[], dict[tuple[int, int], list[tuple[int, float]]]]:
        def measure() -> dict[tuple[int, int], list[tuple[int, float]]]:
            threading.current_thread().name = f"rank {end.rank}"
            probes = LinkProbes(end, torch.device("cpu"), 10.0, on_host=True, num_rounds=6)
            before = multiplied[f"rank {end.rank}"]
            found = probes.messages([(0, 1), (1, 0)], [1 << 12])
            if end.rank == 2:
                assert multiplied["rank 2"] > before
            return found

        return measure

    rows = on_ranks(3, body)
    assert [list(row) for row in rows] == [[(0, 1)], [(1, 0)], []]
    ((num_bytes, seconds),) = rows[0][0, 1]
    assert num_bytes == (1 << 12) + 8 and seconds > 0.0


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
            lambda: LinkProbes(
                end, torch.device("cpu"), 10.0, on_host=True, num_rounds=6
            ).collective(name, ranks, [1 << 14])
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


@pytest.mark.parametrize("name", ["all_gather", "reduce_scatter"])
def test_collectives_among_pieces_of_a_computation(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_probes, "_BETWEEN_SECONDS", 1e-3)
    sizes = [1 << 12, 1 << 14]
    counted = Counted(monkeypatch)
    rows = on_ranks(
        2,
        lambda end: (
            lambda: LinkProbes(end, torch.device("cpu"), 10.0, on_host=True, num_rounds=6).handling(
                name, sizes
            )
        ),
    )
    for found in rows:
        assert [size for size, _ in found] == sizes
        assert all(0.0 <= seconds < 1.0 for _, seconds in found)
    each = 3 * link_probes._STARTED
    for pair in ((0, 1), (1, 0)):
        half = sum(sizes) // 2
        assert counted.sent[pair] // each == pytest.approx(half, abs=64)
