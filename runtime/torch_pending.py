"""A communication of `torch.distributed` under way, and what its failures mean."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from ..compiler.ir.errors import WaitTimeout
from .communicator import PeerLost

__all__ = ["TorchPending", "Wait"]


@dataclass(frozen=True, slots=True)
class Wait:
    """What is waited for, for messages and limits."""

    description: str
    limit_seconds: float
    blocks_host: bool  # gloo: wait returns when the bytes are here; NCCL: orders CUDA streams


class TorchPending:
    """One `dist.Work`. `finish` makes the result from `buffer`, which is kept alive, as is what
    the work reads (`keep_alive`)."""

    def __init__(
        self,
        work: dist.Work,
        wait: Wait,
        buffer: torch.Tensor,
        finish: Callable[[torch.Tensor], torch.Tensor | None],
        keep_alive: torch.Tensor | None = None,
    ) -> None:
        self._work: dist.Work | None = work
        self._sent = keep_alive
        self._wait = wait
        self._buffer: torch.Tensor | None = buffer
        self._finish = finish
        self._result: torch.Tensor | None = None

    def done(self) -> bool:
        """Gloo does not tell before it was waited for: False until then."""
        return self._work is None or (not self._wait.blocks_host and self._work.is_completed())

    def wait(self, timeout_seconds: float | None = None) -> torch.Tensor | None:
        if self._work is not None:
            assert self._buffer is not None
            self._complete(self._work, timeout_seconds)
            self._result = self._finish(self._buffer)
            self._work = self._buffer = self._sent = None
        return self._result

    def _complete(self, work: dist.Work, timeout_seconds: float | None) -> None:
        limit = self._wait.limit_seconds if timeout_seconds is None else timeout_seconds
        began = time.monotonic()
        try:
            if self._wait.blocks_host:
                work.wait(timedelta(seconds=limit))
            else:
                work.wait()
        except RuntimeError as error:
            waited = time.monotonic() - began
            if "timed out" in str(error).lower() or waited >= limit:
                raise WaitTimeout(
                    f"waited {limit:g} s for {self._wait.description}",
                    ways_out=("raise timeout_seconds if the other rank is merely slow",),
                ) from error
            raise PeerLost(
                f"the connection broke while waiting for {self._wait.description}"
            ) from error
