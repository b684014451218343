"""The process of the workers: `python -m cutset.runtime.worker`, started by the launcher.

Importing torch takes seconds, forking a process that has imported it milliseconds. So the
launcher starts one *nursery*; it imports what workers need, forks one worker per rank, and stays
to watch: it tells the launcher how each worker ended, kills all of them when it is told to or
when the launcher is gone (its end of the control connection closes, for whatever reason), and
ends when none is left. If the nursery itself dies, the kernel kills the workers (Linux).
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import faulthandler
import importlib
import os
import select
import signal
import socket
import sys
import traceback

from .rpc import Channel, ConnectionLost
from .service import serve

__all__ = ["main"]

_PR_SET_PDEATHSIG = 1
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_LARGEST_MMAP_THRESHOLD = 32 << 20  # that glibc takes


class _Nursery:
    """Forks the workers and watches over them; single-threaded, as forking requires."""

    def __init__(self, control: Channel, workers: list[tuple[int, int]]) -> None:
        self._control = control
        self._workers = workers
        self._ranks: dict[int, int] = {}
        self._woken, wake = os.pipe()
        for fd in (self._woken, wake):
            os.set_blocking(fd, False)
        signal.set_wakeup_fd(wake)
        signal.signal(signal.SIGCHLD, lambda signum, frame: None)
        self._inherited = [self._woken, wake, control.fileno()]
        self._inherited += [fd for pair in workers for fd in pair]

    def run(self) -> None:
        """Returns when no worker is left."""
        for rank, (channel_fd, output_fd) in enumerate(self._workers):
            nursery = os.getpid()
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                _run_worker(channel_fd, output_fd, self._inherited, nursery)
            self._ranks[pid] = rank
        for pair in self._workers:
            for fd in pair:
                os.close(fd)
        told = False
        while self._reap():
            told = self._wait(told)

    def _wait(self, told: bool) -> bool:
        """Sleeps until a worker ends or the launcher wants the end (or has met its own)."""
        watched = [self._woken] if told else [self._woken, self._control.fileno()]
        waiting = select.poll()  # `select` takes no descriptor above 1023
        for descriptor in watched:
            waiting.register(descriptor, select.POLLIN)
        ready = {descriptor for descriptor, _ in waiting.poll()}
        if self._woken in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(self._woken, 4096)
        if self._control.fileno() in ready:
            self._kill()
            return True
        return told

    def _reap(self) -> bool:
        """Reports the workers that have ended; whether any is left."""
        while self._ranks:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return True
            rank = self._ranks.pop(pid)
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)  # what the worker may have started itself
            with contextlib.suppress(ConnectionLost):
                self._control.send(("ended", rank, os.waitstatus_to_exitcode(status)))
        return False

    def _kill(self) -> None:
        for pid in self._ranks:
            for kill in (os.killpg, os.kill):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    kill(pid, signal.SIGKILL)


def _run_worker(channel_fd: int, output_fd: int, inherited: list[int], nursery: int) -> None:
    """Body of a forked worker; never returns."""
    code = 1
    try:
        os.setpgid(0, 0)
        for fd in inherited:
            if fd not in (channel_fd, output_fd):
                os.close(fd)
        os.dup2(output_fd, 1)
        os.dup2(output_fd, 2)
        os.close(output_fd)
        _die_with_parent(nursery)
        _keep_freed_memory()
        faulthandler.register(signal.SIGUSR1, all_threads=True)
        serve(Channel(socket.socket(fileno=channel_fd)))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _die_with_parent(parent: int) -> None:
    """Has the kernel kill this process when `parent`, which forked it, ends (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def _keep_freed_memory() -> None:
    """Has malloc keep what a step frees for the next step (glibc).

    It would give the pages back at the end of every step, and fault them in again, zeroed by the
    kernel, in the first microbatches of the next.
    """
    with contextlib.suppress(AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
        mallopt(_M_TRIM_THRESHOLD, -1)


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the nursery; file descriptors come from the launcher, open."""
    parser = argparse.ArgumentParser(prog="python -m cutset.runtime.worker")
    parser.add_argument("--control", type=int, required=True)
    parser.add_argument("--worker", action="append", required=True, metavar="CHANNEL:OUTPUT")
    parser.add_argument("--preload", action="append", default=[], metavar="MODULE")
    options = parser.parse_args(arguments)
    for module in options.preload:
        importlib.import_module(module)
    pairs = [pair.split(":") for pair in options.worker]
    workers = [(int(channel), int(output)) for channel, output in pairs]
    control = Channel(socket.socket(fileno=options.control))
    _Nursery(control, workers).run()
    os._exit(0)  # tearing down the interpreter takes a second and does nothing for us


if __name__ == "__main__":
    main()
