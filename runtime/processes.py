"""The worker processes as the launcher holds them: start, output, how they ended, kill.

Ownership is one-way: whoever holds `WorkerProcesses` decides when they end, by `stop`. They also
end when the holder's process does, however that happens, because the nursery (see `worker`)
watches the control connection. They run in a session of their own, so Ctrl-C in a terminal
reaches the driver alone.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from .rpc import Channel, ConnectionLost

__all__ = ["Ended", "WorkerProcesses"]

_KEPT_OUTPUT_BYTES = 1 << 16
_SHOWN_LINES = 20
_POLITE_SECONDS = 3.0
_KILL_SECONDS = 5.0


class Ended(Exception):
    """A worker process has ended.

    Args:
        rank: whose process.
        code: exit code, negative for the signal that killed it, None if unknown.
    """

    def __init__(self, rank: int, code: int | None) -> None:
        self.rank = rank
        self.code = code
        super().__init__(rank, code)


class _Output:
    """Keeps the last bytes that each process has written, so that none ever blocks on a pipe."""

    def __init__(self, pipes: Sequence[int]) -> None:
        self._kept = [bytearray() for _ in pipes]
        self._thread = threading.Thread(
            target=self._drain, args=(pipes,), name="cutset worker output", daemon=True
        )
        self._thread.start()

    def _drain(self, pipes: Sequence[int]) -> None:
        with selectors.DefaultSelector() as selector:
            for index, fd in enumerate(pipes):
                selector.register(fd, selectors.EVENT_READ, index)
            while selector.get_map():
                for key, _ in selector.select():
                    data = os.read(key.fd, 1 << 16)
                    if not data:
                        selector.unregister(key.fd)
                        os.close(key.fd)
                    kept = self._kept[key.data]
                    kept += data
                    del kept[:-_KEPT_OUTPUT_BYTES]

    def tail(self, index: int) -> str:
        """The last lines of one process."""
        text = bytes(self._kept[index]).decode(errors="replace")
        return "\n".join(text.splitlines()[-_SHOWN_LINES:])

    def join(self, timeout_seconds: float) -> None:
        """Wait until all processes have closed their output."""
        self._thread.join(timeout_seconds)


class WorkerProcesses:
    """`count` running workers, connected by `channels`.

    Args:
        count: number of workers.
        environment: of the processes.
        preload: modules that are imported once, before the workers fork.
    """

    def __init__(self, count: int, environment: Mapping[str, str], preload: Sequence[str]) -> None:
        control, far_control = socket.socketpair()
        pairs = [socket.socketpair() for _ in range(count)]
        pipes = [os.pipe() for _ in range(count + 1)]
        workers = [
            f"{far.fileno()}:{pipe[1]}" for (_, far), pipe in zip(pairs, pipes, strict=False)
        ]
        command = [sys.executable, "-P", "-m", "cutset.runtime.worker"]
        command += ["--control", str(far_control.fileno())]
        command += [item for worker in workers for item in ("--worker", worker)]
        command += [item for module in preload for item in ("--preload", module)]
        far_ends = [far_control, *(far for _, far in pairs)]
        try:
            self._nursery = subprocess.Popen(
                command,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=pipes[count][1],
                stderr=pipes[count][1],
                pass_fds=[*(end.fileno() for end in far_ends), *(pipe[1] for pipe in pipes)],
                start_new_session=True,
            )
        finally:
            for end in far_ends:
                end.close()
            for _, write_end in pipes:
                os.close(write_end)
        self._output = _Output([read_end for read_end, _ in pipes])
        self._control = Channel(control)
        self._codes: dict[int, int | None] = {}
        self._owner = os.getpid()
        self._stopped = False
        self.channels = tuple(Channel(near) for near, _ in pairs)

    def wait_any(self, ranks: Sequence[int], timeout_seconds: float) -> list[int]:
        """Those of `ranks` that have sent something, after at most `timeout_seconds`.

        Raises:
            Ended: one of `ranks` has ended. (What it had sent before is not lost: it comes first.)
        """
        with selectors.DefaultSelector() as selector:
            for rank in ranks:
                selector.register(self.channels[rank], selectors.EVENT_READ, rank)
            selector.register(self._control, selectors.EVENT_READ, None)
            found = [key.data for key, _ in selector.select(timeout_seconds)]
        ready = sorted(rank for rank in found if rank is not None)
        if ready:
            return ready
        if None in found:
            self._read_control()
        for rank in ranks:
            if rank in self._codes:
                raise Ended(rank, self._codes[rank])
        return []

    def ended(self, rank: int, timeout_seconds: float = _KILL_SECONDS) -> Ended:
        """How the worker `rank`, whose channel is closed, has ended."""
        deadline = time.monotonic() + timeout_seconds
        while rank not in self._codes and (left := deadline - time.monotonic()) > 0:
            with selectors.DefaultSelector() as selector:
                selector.register(self._control, selectors.EVENT_READ)
                if selector.select(left):
                    self._read_control()
        return Ended(rank, self._codes.get(rank))

    def _read_control(self) -> None:
        """Take in one report; a nursery that is gone counts as the end of all its workers."""
        try:
            message: Any = self._control.recv(_KILL_SECONDS)
            self._codes[message[1]] = message[2]
        except (ConnectionLost, TimeoutError):
            code = None
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = self._nursery.wait(_KILL_SECONDS)
            for rank in range(len(self.channels)):
                self._codes.setdefault(rank, code)

    def output(self, rank: int) -> str:
        """Last lines that worker `rank` has written, or the nursery's if it has written none."""
        return self._output.tail(rank) or self._output.tail(len(self.channels))

    def settle_output(self) -> None:
        """After `stop`: wait until all output is in."""
        self._output.join(1.0)

    def stop(self, *, politely: bool = False, starting: bool = False) -> None:
        """End all processes and wait until they are gone. May be called again.

        Args:
            politely: give workers that are idle a moment to end by themselves.
            starting: the nursery may still be importing, deaf for seconds: kill it at once.
                Workers that it has just forked end with it, or when their channels close.
        """
        if self._stopped or os.getpid() != self._owner:
            return  # in a fork of the driver: the workers are not ours
        self._stopped = True
        if politely:
            for channel in self.channels:
                with contextlib.suppress(ConnectionLost, TimeoutError):
                    channel.send(("exit",), timeout=0.1)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._nursery.wait(_POLITE_SECONDS)
        for channel in self.channels:
            channel.close()
        self._control.close()  # the nursery kills and reaps its workers, then ends
        if starting:
            self._nursery.kill()
        try:
            self._nursery.wait(_KILL_SECONDS)
        except subprocess.TimeoutExpired:
            self._nursery.kill()
            self._nursery.wait()
