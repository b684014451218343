"""Sessions: how the front end calls methods of all ranks, wherever they live.

A `Session` runs `method(**arguments)` on the `Rank` object of every rank and returns the replies
of all ranks. In a `LocalSession` ranks are workers of this process, which is the driver; in an
`SpmdSession` each process (one per rank, started by `torchrun`) holds one rank, makes the same
calls, and sees the replies of all.

Failure is common: when a rank fails, dies or does not answer, the call raises, on every rank, the
error that came first by its nature (a death before a broken connection), and the session ends
unless every rank refused the call in the same way (errors of the caller).
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, Protocol

from ..compiler.ir.errors import CutsetError, RuntimeFailure, UsageError, WaitTimeout, WorkerLost
from .communicator import PeerLost
from .processes import Ended, WorkerProcesses
from .rpc import ConnectionLost
from .service import Failure, WorkerSpec

__all__ = [
    "Arguments",
    "LocalSession",
    "RemoteTraceback",
    "Session",
    "is_callers_fault",
    "per_rank",
    "raise_first",
]

Arguments = Mapping[str, Any] | Sequence[Mapping[str, Any]]

# After the first failure, for others to tell theirs: longer if theirs may be the cause of it.
_GRACE_SECONDS = 3.0
_SHORT_GRACE_SECONDS = 0.5
_POLL_SECONDS = 2.0
_STACK_SECONDS = 0.3  # for a worker to print where it is


class Session(Protocol):
    """All ranks of a job, as seen by the code that drives them."""

    @property
    def num_ranks(self) -> int: ...

    @property
    def local_ranks(self) -> tuple[int, ...]:
        """Ranks that live in this process."""
        ...

    def call(
        self, method: str, arguments: Arguments = (), *, timeout_seconds: float | None = None
    ) -> list[Any]:
        """Call `method` on every rank at once and return the replies in the order of ranks.

        Args:
            arguments: keyword arguments, one mapping for all ranks or a sequence with one each.
            timeout_seconds: longest time for all to answer; None: no limit here, the waits of
                the ranks for each other have theirs.

        Raises:
            WorkerLost: a rank's process ended.
            WaitTimeout: not all ranks answered in time.
            CutsetError: what a rank raised; other exceptions come as RuntimeFailure.
        """
        ...

    def close(self) -> None:
        """End the job. May be called again."""
        ...


class RemoteTraceback(Exception):
    """The traceback of an exception in another process, shown as the cause of its copy here."""

    def __init__(self, text: str) -> None:
        self.text = text
        super().__init__(text)

    def __str__(self) -> str:
        return f"\n{self.text}"


def per_rank(arguments: Arguments, num_ranks: int) -> list[dict[str, Any]]:
    """Keyword arguments of every rank."""
    if isinstance(arguments, Mapping):
        return [dict(arguments)] * num_ranks
    rows = [dict(row) for row in arguments] or [{} for _ in range(num_ranks)]
    if len(rows) != num_ranks:
        raise UsageError(f"arguments for {len(rows)} ranks were given to {num_ranks} ranks")
    return rows


def raise_first(failures: Mapping[int, Failure | CutsetError], method: str) -> NoReturn:
    """Raise the failure that explains the others: a death, an error, a broken connection."""

    def order(rank: int) -> tuple[int, int]:
        failure = failures[rank]
        error = failure.error if isinstance(failure, Failure) else failure
        kinds = (WorkerLost, WaitTimeout, PeerLost)
        weight = {WorkerLost: 0, WaitTimeout: 2, PeerLost: 3}
        return next((weight[kind] for kind in kinds if isinstance(error, kind)), 1), rank

    rank = min(failures, key=order)
    failure = failures[rank]
    if isinstance(failure, CutsetError):
        raise failure
    place = f"rank {rank}, in {method}"
    error: CutsetError
    if failure.error is not None:
        where = "; ".join(filter(None, (failure.error.where, place)))
        error = type(failure.error)(
            failure.error.cause, where=where, ways_out=failure.error.ways_out
        )
    else:
        error = RuntimeFailure(f"{failure.kind}: {failure.message}", where=place)
    raise error from RemoteTraceback(failure.traceback)


def is_callers_fault(failures: Mapping[int, Failure | CutsetError], num_ranks: int) -> bool:
    """Whether all ranks refused a call before doing anything, so that the job can go on."""
    return len(failures) == num_ranks and all(
        isinstance(failure, Failure) and isinstance(failure.error, ValueError)
        for failure in failures.values()
    )


class LocalSession:
    """Ranks in worker processes of this one; made by `launcher.launch_local`.

    Workers end with `close`, with the last reference to the session, and with this process.
    """

    def __init__(
        self,
        processes: WorkerProcesses,
        specs: Sequence[WorkerSpec],
        *,
        keep_alive: object,
        start_seconds: float,
    ) -> None:
        self._processes = processes
        self._keep_alive = keep_alive  # the store that the ranks use to find each other
        self._broken = ""
        self._finalizer = weakref.finalize(self, processes.stop, politely=True)
        self._pids: tuple[int, ...] = ()
        self._start_seconds = start_seconds
        self._starting = True
        self._send([("start", spec) for spec in specs], None)

    @property
    def num_ranks(self) -> int:
        return len(self._processes.channels)

    @property
    def local_ranks(self) -> tuple[int, ...]:
        return ()

    @property
    def is_open(self) -> bool:
        """Whether calls are possible: not closed, and no rank has failed."""
        return self._finalizer.alive

    def __enter__(self) -> LocalSession:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        self._broken = self._broken or "it was closed"
        if self._starting:
            self._processes.stop(starting=True)  # nobody is ready to end by itself
        self._finalizer()

    @property
    def process_ids(self) -> tuple[int, ...]:
        """Of the workers, in the order of ranks."""
        self.wait_ready()
        return self._pids

    def wait_ready(self) -> None:
        """Wait until all workers have started; the first call does it by itself."""
        if self._starting:
            self._starting = False
            self._pids = tuple(self._finish("start", self._start_seconds))

    def call(
        self, method: str, arguments: Arguments = (), *, timeout_seconds: float | None = None
    ) -> list[Any]:
        if not self.is_open:
            raise RuntimeFailure(
                f"{method} was called on a session that has ended: {self._broken}",
                ways_out=("start a new session",),
            )
        rows = per_rank(arguments, self.num_ranks)
        self.wait_ready()
        try:
            self._send([("call", method, row) for row in rows], timeout_seconds)
        except BaseException as error:
            self._end(f"{type(error).__name__} during {method}")
            raise
        return self._finish(method, timeout_seconds)

    def _finish(self, name: str, timeout_seconds: float | None) -> list[Any]:
        """The answers to the requests that were sent last; ends the session if it must."""
        try:
            replies, failures = self._collect(name, timeout_seconds)
        except BaseException as error:  # Ctrl-C too: the ranks are in the middle of something
            self._end(f"{type(error).__name__} during {name}")
            raise
        if not failures:
            return [replies[rank] for rank in range(self.num_ranks)]
        if not is_callers_fault(failures, self.num_ranks):
            self._end(f"{name} failed on rank {min(failures)}")
        raise_first(self._told(failures), name)

    def _end(self, reason: str) -> None:
        self._broken = reason
        self._finalizer.detach()
        self._processes.stop()

    def _send(self, requests: Sequence[tuple[Any, ...]], timeout_seconds: float | None) -> None:
        """Send one request to each rank; see `service`."""
        for rank, request in enumerate(requests):
            try:
                self._processes.channels[rank].send(request, timeout_seconds)
            except ConnectionLost:
                continue  # `_collect` finds out how the worker has ended
            except TimeoutError:
                raise WaitTimeout(
                    f"rank {rank} did not take its request within {timeout_seconds:g} s"
                ) from None

    def _collect(
        self, name: str, timeout_seconds: float | None
    ) -> tuple[dict[int, Any], dict[int, Failure | CutsetError]]:
        """Answers and failures by rank; after a failure, ranks that are stuck have neither."""
        replies: dict[int, Any] = {}
        failures: dict[int, Failure | CutsetError] = {}
        waiting = list(range(self.num_ranks))
        limit = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        grace: float | None = None
        while waiting:
            deadlines = [moment for moment in (limit, grace) if moment is not None]
            left = min(deadlines, default=float("inf")) - time.monotonic()
            if left <= 0:
                break
            for rank, kind, answer in self._receive(waiting, min(left, _POLL_SECONDS)):
                waiting.remove(rank)
                (replies if kind == "ok" else failures)[rank] = answer
            if failures and grace is None:
                grace = time.monotonic() + _grace_seconds(failures)
        if waiting and not failures:
            raise WaitTimeout(
                f"rank {', '.join(map(str, waiting))} did not answer {name} within "
                f"{timeout_seconds:g} s{self._whereabouts(waiting[0])}"
            )
        return replies, failures

    def _whereabouts(self, rank: int) -> str:
        """Where a worker that does not answer is: the stacks that it prints on SIGUSR1."""
        if not self._pids:
            return ""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pids[rank], signal.SIGUSR1)
        time.sleep(_STACK_SECONDS)
        return f"; rank {rank} is at:\n{self._processes.output(rank)}"

    def _receive(self, waiting: list[int], timeout_seconds: float) -> list[tuple[int, str, Any]]:
        """(rank, kind, answer) of those that have something to say."""
        try:
            ready = self._processes.wait_any(waiting, timeout_seconds)
        except Ended as ended:
            return [(ended.rank, "lost", self._lost(ended))]
        answers = []
        for rank in ready:
            try:
                kind, answer = self._processes.channels[rank].recv()
            except ConnectionLost:
                kind, answer = "lost", self._lost(self._processes.ended(rank))
            answers.append((rank, kind, answer))
        return answers

    def _lost(self, ended: Ended) -> WorkerLost:
        return WorkerLost(
            f"the worker of rank {ended.rank} ended {_how(ended.code)}",
            where=f"rank {ended.rank}",
        )

    def _told(
        self, failures: Mapping[int, Failure | CutsetError]
    ) -> dict[int, Failure | CutsetError]:
        """The same, with the last output of workers that were lost."""
        told = dict(failures)
        for rank, failure in failures.items():
            if isinstance(failure, WorkerLost):
                self._processes.settle_output()
                output = self._processes.output(rank) or "(it wrote nothing)"
                told[rank] = WorkerLost(
                    f"{failure.cause}; its last output:\n{output}", where=failure.where
                )
        return told


def _grace_seconds(failures: Mapping[int, Failure | CutsetError]) -> float:
    """How long to listen to other ranks after the first failures."""
    for failure in failures.values():
        error = failure.error if isinstance(failure, Failure) else failure
        if error is None or isinstance(error, WorkerLost):
            return _SHORT_GRACE_SECONDS
    return _GRACE_SECONDS


def _how(code: int | None) -> str:
    """`by SIGKILL`, `with exit code 1`."""
    if code is None:
        return "for an unknown reason"
    if code >= 0:
        return f"with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    hint = " (out of memory?)" if name == "SIGKILL" else ""
    return f"by {name}{hint}"
