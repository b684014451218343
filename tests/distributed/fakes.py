"""Rank objects for tests of the launcher: small, and able to fail in every way."""

from __future__ import annotations

import torch

from cutset.compiler.ir.types import TensorType
from cutset.runtime.communicator import Communicator


class FakeRank:
    """Stands in for `cutset.runtime.rank.Rank`."""

    def __init__(
        self,
        rank: int,
        num_ranks: int,
        device: torch.device,
        communicator: Communicator,
        timeout_seconds: float,
    ) -> None:
        self.rank = rank
        self.num_ranks = num_ranks
        self.communicator = communicator

    def add(self, x: torch.Tensor, y: int) -> torch.Tensor:
        return x + y

    def ring(self) -> list[float]:
        """Passes the rank on to the right and reduces what came from the left."""
        right = (self.rank + 1) % self.num_ranks
        left = (self.rank - 1) % self.num_ranks
        pending = self.communicator.recv(TensorType((2,), torch.float32), left, 7, label="token")
        sent = self.communicator.send(torch.full((2,), float(self.rank)), right, 7, label="token")
        received = pending.wait()
        sent.wait()
        assert received is not None
        total = self.communicator.all_reduce(received, range(self.num_ranks), "sum", label="tokens")
        return total.tolist()
