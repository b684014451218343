"""Peak memory on the CPU is what was alive at once, not the sum of what was allocated."""

from __future__ import annotations

import torch

from cutset.runtime.memory import measure_peak, storage_bytes

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


def test_views_share_their_storage() -> None:
    tensor = torch.empty(MIB, dtype=torch.uint8)
    assert storage_bytes([tensor, tensor[10:], tensor.view(2, -1)]) == MIB
