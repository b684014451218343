"""All ranks in this process, by turns, over a simulated network.

The partitioned program runs for real, instruction by instruction, on real tensors; only processes
and wires are simulated. It serves translation validation (is the program right?) and tests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..compiler.ir.errors import VerificationError
from .executor import Executor
from .local_communicator import LocalNetwork
from .rank import Rank

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
        arguments: Sequence[dict[str, Any]] | dict[str, Any],
        *,
        timeout_seconds: float | None = None,
    ) -> list[Any]:
        """Call `method` on every rank; see `Session.call`.

        Raises:
            VerificationError: no rank can go on (a deadlock).
        """
        each = [arguments] * self.num_ranks if isinstance(arguments, Mapping) else arguments
        if method not in _STEPS:
            return [
                getattr(rank, method)(**entry)
                for rank, entry in zip(self.ranks, each, strict=False)
            ]
        executors = []
        for rank, entry in zip(self.ranks, each, strict=False):
            options = {name: item for name, item in entry.items() if name != "measure_memory"}
            executors.append(getattr(rank, _STEPS[method])(**options))
        _take_turns(executors)
        return [
            rank.reply(entry["key"]) | {"peak_bytes": None}
            for rank, entry in zip(self.ranks, each, strict=False)
        ]

    def close(self) -> None:
        """Nothing to end."""


def _take_turns(executors: list[Executor]) -> None:
    while not all(executor.finished for executor in executors):
        progress = False
        for executor in executors:
            while not executor.finished and executor.advance():
                progress = True
        if not progress:
            stuck = [executor.position for executor in executors]
            raise VerificationError(f"no rank can go on; they wait at instructions {stuck}")
