"""A communication of `torch.distributed` under way, and what its failures mean."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch

from ..compiler.ir.errors import WaitTimeout
from .communicator import PeerLost

__all__ = ["TorchPending", "Wait"]

Work = Any  # dist.Work, or several that are waited for alike


@dataclass(frozen=True, slots=True)
class Wait:
    """What is waited for, for messages and limits."""

    description: str
    limit_seconds: float
    blocks_host: bool  # gloo: wait returns when the bytes are here; NCCL: orders CUDA streams


class TorchPending:
    """One `dist.Work`. `finish`, which keeps alive what the work reads, makes the result from
    `buffer`."""

    def __init__(
        self,
        work: Work,
        wait: Wait,
        buffer: torch.Tensor,
        finish: Callable[[torch.Tensor], torch.Tensor | None],
    ) -> None:
        self._work: Work | None = work
        self._wait = wait
        self._buffer: torch.Tensor | None = buffer
        self._finish: Callable[[torch.Tensor], torch.Tensor | None] | None = finish
        self._result: torch.Tensor | None = None

    def done(self) -> bool:
        """Gloo does not tell before it was waited for: False until then."""
        return self._work is None or (not self._wait.blocks_host and self._work.is_completed())

    @property
    def blocks_host(self) -> bool:
        """Whether `wait` waits for the end, and does not only put it in order before later work."""
        return self._wait.blocks_host

    def wait_on_host(self, poll_seconds: float) -> None:
        """Wait for the end of what `wait` would only put in order.

        Raises:
            WaitTimeout: it takes longer than the limit.
        """
        began = time.monotonic()
        while not self.done():
            if time.monotonic() - began > self._wait.limit_seconds:
                raise _too_long(self._wait, self._wait.limit_seconds)
            time.sleep(poll_seconds)

    def wait(self, timeout_seconds: float | None = None) -> torch.Tensor | None:
        if self._work is not None:
            assert self._buffer is not None and self._finish is not None
            self._complete(self._work, timeout_seconds)
            self._work = None  # first: it holds the buffers, too
            self._result = self._finish(self._buffer)
            self._buffer = self._finish = None
        return self._result

    def _complete(self, work: Work, timeout_seconds: float | None) -> None:
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
                raise _too_long(self._wait, limit) from error
            raise PeerLost(
                f"the connection broke while waiting for {self._wait.description}"
            ) from error


def _too_long(wait: Wait, limit_seconds: float) -> WaitTimeout:
    return WaitTimeout(
        f"waited {limit_seconds:g} s for {wait.description}",
        ways_out=("raise timeout_seconds if the other rank is merely slow",),
    )
