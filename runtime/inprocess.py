"""All ranks in this process, by turns or in threads, over a simulated network.

The partitioned program runs for real, instruction by instruction, on real tensors; only processes
and wires are simulated. It serves translation validation (is the program right?) and tests.

Ranks take turns in the calling thread, instruction by instruction. A stage that holds collectives
waits in the midst of an instruction, so then every rank runs in a thread of its own.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from ..compiler.ir.errors import CutsetError, RuntimeFailure, VerificationError
from .executor import Executor
from .local_communicator import LocalNetwork
from .rank import Rank
from .service import Failure, failure_of
from .session import Arguments, per_rank, raise_first

__all__ = ["InProcessSession"]

_STEPS = {"train_step": "begin_train_step", "infer": "begin_infer"}


class InProcessSession:
    """A `Session` whose ranks live here; see the module docstring. `host`: see `Rank`."""

    def __init__(
        self,
        num_ranks: int,
        device: torch.device | None = None,
        host: torch.device | None = None,
    ) -> None:
        self.num_ranks = num_ranks
        self.local_ranks = tuple(range(num_ranks))
        self._network = LocalNetwork(num_ranks)
        self._ended = ""
        place = device or torch.device("cpu")
        self.ranks = [
            Rank(rank, num_ranks, place, self._network.communicator(rank, place), host=host)
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
            RuntimeFailure: a rank has failed, now or in an earlier call.
        """
        if self._ended:
            raise RuntimeFailure(f"{method} was called on a session that has ended: {self._ended}")
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
        if any(
            rank.meets_inside(key=entry["key"])
            for rank, entry in zip(self.ranks, each, strict=True)
        ):
            self._run_threads(executors, method)
        else:
            _take_turns(executors)
        return [
            rank.reply(entry["key"]) | {"peak_bytes": None}
            for rank, entry in zip(self.ranks, each, strict=True)
        ]

    def close(self) -> None:
        """Nothing to end."""

    def _run_threads(self, executors: list[Executor], method: str) -> None:
        """Run every rank to its end. The first failure ends the waits of all others."""
        failures: dict[int, Failure | CutsetError] = {}

        def run(rank: int) -> None:
            failure = None
            try:
                executors[rank].run()
            except Exception as error:
                failures[rank] = failure_of(error)
                failure = f"rank {rank} failed"
            try:
                self._network.end_thread(failure)
            except VerificationError as error:
                failures[rank] = failure_of(error)

        self._network.start_threads(len(executors))
        with ThreadPoolExecutor(len(executors)) as threads:
            list(threads.map(run, range(len(executors))))
        if failures:
            self._ended = f"{method} failed"
            raise_first(failures, method)


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
