"""Functions of a rank run by all ranks of a simulated network, each in a thread."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from cutset.runtime.communicator import Communicator
from cutset.runtime.local_communicator import LocalNetwork

T = TypeVar("T")


def on_ranks(count: int, make: Callable[[Communicator], Callable[[], T]]) -> list[T]:
    """Results of `make(communicator)()` in the order of ranks.

    All are made first, one by one, as torch traces in one thread only.
    """
    network = LocalNetwork(count, timeout_seconds=10.0)
    bodies = [make(network.communicator(rank)) for rank in range(count)]

    def run(body: Callable[[], T]) -> T:
        failure = "another rank failed"
        try:
            result = body()
            failure = ""
        finally:
            network.end_thread(failure or None)
        return result

    network.start_threads(count)
    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(run, bodies))
