"""The session of one rank among processes that all make the same calls (under `torchrun`).

A call runs the method of the rank that lives here, then exchanges replies over gloo, so that all
ranks see all replies. Short replies travel in one collective; a long one is then broadcast.

A rank that fails leaves a note in the store. If all ranks soon note the same kind of refusal, the
job goes on; otherwise the rank breaks its connections, so that ranks which wait for it wake up,
read the notes, and raise what came first.
"""

from __future__ import annotations

import contextlib
import time
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from ..compiler.ir.errors import CutsetError, RuntimeFailure, WaitTimeout
from .communicator import PeerLost
from .rpc import decode, encode
from .service import Failure, call_method, failure_of
from .session import Arguments, is_callers_fault, per_rank, raise_first
from .stores import Store
from .torch_communicator import TorchCommunicator

__all__ = ["SpmdSession"]

_SLOT_BYTES = 8192  # a longer reply needs a second collective
_LENGTH_BYTES = 8
_GRACE_SECONDS = 3.0  # for other ranks to note their failures of the same call
_NOTE_SECONDS = 1.0  # for the note of a rank whose connection broke
_POLL_SECONDS = 0.05
_FOREVER_SECONDS = 86400.0


class SpmdSession:
    """See the module docstring and `Session`; made by `launcher.spmd_session`.

    Args:
        target: the Rank of this process.
        rank, num_ranks: of the job.
        communicator: of `target`.
        store: where failures are noted.
        gloo: a gloo group of all ranks; None: the default group is one, and is ours to end.
    """

    def __init__(
        self,
        target: object,
        rank: int,
        num_ranks: int,
        *,
        communicator: TorchCommunicator,
        store: Store,
        gloo: Any,
    ) -> None:
        self._target = target
        self._communicator = communicator
        self._rank = rank
        self._num_ranks = num_ranks
        self._store = store
        self._gloo = gloo
        self._calls = 0
        self._ended = ""

    @property
    def num_ranks(self) -> int:
        return self._num_ranks

    @property
    def local_ranks(self) -> tuple[int, ...]:
        return (self._rank,)

    @property
    def is_open(self) -> bool:
        """Whether calls are possible: not closed, and no rank has failed."""
        return not self._ended

    def close(self) -> None:
        if not self._ended and self._gloo is None and dist.is_initialized():
            dist.destroy_process_group()
        self._ended = self._ended or "it was closed"

    def call(
        self, method: str, arguments: Arguments = (), *, timeout_seconds: float | None = None
    ) -> list[Any]:
        if self._ended:
            raise RuntimeFailure(
                f"{method} was called on a session that has ended: {self._ended}",
                ways_out=("start the job again",),
            )
        own = per_rank(arguments, self._num_ranks)[self._rank]
        self._calls += 1
        try:
            message = b"".join(encode(call_method(self._target, method, own)))
        except Exception as error:
            self._raise_own(method, failure_of(error))
        limit = _FOREVER_SECONDS if timeout_seconds is None else timeout_seconds
        try:
            return self._exchange(message, limit)
        except RuntimeError as error:
            self._raise_noted(method, error, limit)

    def _raise_own(self, method: str, failure: Failure) -> NoReturn:
        """This rank has failed: tell the others, hear theirs, raise what came first."""
        self._store.set(self._note(self._rank), b"".join(encode(failure)))
        failures = self._noted(self._num_ranks, _GRACE_SECONDS)
        failures[self._rank] = failure
        if not is_callers_fault(failures, self._num_ranks):
            self._end(f"{method} failed on rank {min(failures)}")
        raise_first(failures, method)

    def _raise_noted(self, method: str, error: RuntimeError, limit_seconds: float) -> NoReturn:
        """Not all ranks came to the exchange: raise why."""
        failures = self._noted(1, _NOTE_SECONDS)
        self._end(f"{method} failed")
        if not failures:
            timed_out = "timed out" in str(error).lower()
            failures[self._rank] = (
                WaitTimeout(f"not all ranks answered {method} within {limit_seconds:g} s")
                if timed_out
                else PeerLost(f"the connection to another rank broke during {method}")
            )
        raise_first(failures, method)

    def _end(self, reason: str) -> None:
        self._ended = reason
        self._communicator.abort()

    def _exchange(self, message: bytes, limit_seconds: float) -> list[Any]:
        """Replies of all ranks. Raises RuntimeError when a rank does not come."""
        limit = timedelta(seconds=limit_seconds)
        inline = _SLOT_BYTES - _LENGTH_BYTES
        slot = len(message).to_bytes(_LENGTH_BYTES, "little") + message[:inline]
        mine = torch.zeros(_SLOT_BYTES, dtype=torch.uint8)
        mine[: len(slot)] = _tensor(slot)
        slots = [torch.empty_like(mine) for _ in range(self._num_ranks)]
        _wait(dist.all_gather(slots, mine, group=self._gloo, async_op=True), limit)
        messages = []
        for rank, theirs in enumerate(slots):
            data = theirs.numpy().tobytes()
            length = int.from_bytes(data[:_LENGTH_BYTES], "little")
            if length > inline:
                whole = _tensor(message) if rank == self._rank else None
                block = torch.empty(length, dtype=torch.uint8) if whole is None else whole
                _wait(dist.broadcast(block, rank, group=self._gloo, async_op=True), limit)
                messages.append(block.numpy().tobytes())
            else:
                messages.append(data[_LENGTH_BYTES : _LENGTH_BYTES + length])
        return [decode(item) for item in messages]

    def _note(self, rank: int) -> str:
        return f"cutset/failure/{self._calls}/{rank}"

    def _noted(self, wanted: int, seconds: float) -> dict[int, Failure | CutsetError]:
        """Failures that ranks note for this call: at least `wanted` unless time runs out."""
        found: dict[int, Failure | CutsetError] = {}
        deadline = time.monotonic() + seconds
        with contextlib.suppress(RuntimeError):  # the store may be gone with its rank
            while len(found) < wanted and time.monotonic() < deadline:
                for rank in range(self._num_ranks):
                    if rank not in found and self._store.check([self._note(rank)]):
                        found[rank] = decode(self._store.get(self._note(rank)))
                time.sleep(_POLL_SECONDS)
        return found


def _tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _wait(work: dist.Work | None, limit: timedelta) -> None:
    assert work is not None
    work.wait(limit)
