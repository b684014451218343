"""All ranks in this process, by turns, over a simulated network.

The partitioned program runs for real, instruction by instruction, on real tensors; only processes
and wires are simulated. It serves translation validation (is the program right?) and tests.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from ..compiler.ir.errors import VerificationError
from .executor import Executor
from .local_communicator import LocalNetwork
from .rank import Rank
from .session import Arguments, per_rank

__all__ = ["InProcessSession"]

_STEPS = {"train_step": "begin_train_step", "infer": "begin_infer"}


class InProcessSession:
    """A `Session` whose ranks take turns in the calling thread."""

    def __init__(self, num_ranks: int, device: torch.device | None = None) -> None:
        self.num_ranks = num_ranks
        self.local_ranks = tuple(range(num_ranks))
        network = LocalNetwork(num_ranks)
        place = device or torch.device("cpu")
        self.ranks = [
            Rank(rank, num_ranks, place, network.communicator(rank, place))
            for rank in range(num_ranks)
        ]

    def call(
        self,
        method: str,
        arguments: Arguments = (),
        *,
        timeout_seconds: float | None = None,
    ) -> list[Any]:
        """Call `method` on every rank; see `Session.call`.

        Raises:
            VerificationError: no rank can go on (a deadlock).
        """
        each = per_rank(arguments, self.num_ranks)
        if method not in _STEPS:
            return [
                _copied(getattr(rank, method)(**entry))
                for rank, entry in zip(self.ranks, each, strict=True)
            ]
        executors = []
        for rank, entry in zip(self.ranks, each, strict=True):
            options = {name: item for name, item in entry.items() if name != "measure_memory"}
            executors.append(getattr(rank, _STEPS[method])(**options))
        _take_turns(executors)
        return [
            rank.reply(entry["key"]) | {"peak_bytes": None}
            for rank, entry in zip(self.ranks, each, strict=True)
        ]

    def close(self) -> None:
        """Nothing to end."""


def _copied(reply: Any) -> Any:
    """What a caller in another process would see: its own tensors."""
    return tree_map_only(torch.Tensor, torch.Tensor.clone, reply)


def _take_turns(executors: list[Executor]) -> None:
    while not all(executor.finished for executor in executors):
        progress = False
        for executor in executors:
            while not executor.finished and executor.advance():
                progress = True
        if not progress:
            stuck = [executor.position for executor in executors]
            raise VerificationError(f"no rank can go on; they wait at instructions {stuck}")
