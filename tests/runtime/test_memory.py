"""Peak memory on the CPU is what was alive at once, not the sum of what was allocated."""

from __future__ import annotations

import time

import torch

from cutset.runtime.memory import measure_peak, storage_bytes, until_unused, uses

CPU = torch.device("cpu")
MIB = 1 << 20


def test_peak_counts_what_is_alive_together() -> None:
    def run() -> int:
        for _ in range(5):
            tensor = torch.empty(4 * MIB, dtype=torch.uint8)
            other = torch.empty(2 * MIB, dtype=torch.uint8)
            del tensor, other
        return 7

    held = [torch.empty(3 * MIB, dtype=torch.uint8)]
    result, peak = measure_peak(run, CPU, held)
    assert result == 7
    assert 9 * MIB <= peak < 9 * MIB + 4096


class Held:
    """A tensor that another thread holds for a while."""

    def __init__(self, others: int) -> None:
        self.others = others

    def _use_count(self) -> int:
        self.others -= 1
        return 1 + max(self.others, 0)


def test_what_another_thread_holds_is_waited_for() -> None:
    held = Held(others=6)
    until_unused(held, 1)  # type: ignore[arg-type]
    assert held.others == 0
    tensor = torch.empty(1)
    began = time.monotonic()
    until_unused(tensor, uses(tensor))
    assert time.monotonic() - began < 0.5
    for_ever = Held(others=1 << 62)
    until_unused(for_ever, 1)  # type: ignore[arg-type]
    assert for_ever.others < 1 << 62


def test_views_share_their_storage() -> None:
    tensor = torch.empty(MIB, dtype=torch.uint8)
    assert storage_bytes([tensor, tensor[10:], tensor.view(2, -1)]) == MIB
