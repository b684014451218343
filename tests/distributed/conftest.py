"""Workers that the whole session of tests shares, as starting processes takes seconds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from cutset.runtime.launcher import PRELOAD, RANK_FACTORY, launch_local
from cutset.runtime.session import LocalSession


class WorkerPool:
    """Open sessions by number of ranks and factory; one that a test has broken is replaced."""

    def __init__(self) -> None:
        self._sessions: dict[tuple[int, str], LocalSession] = {}

    def session(self, num_ranks: int, factory: str = RANK_FACTORY) -> LocalSession:
        """A session with `num_ranks` workers on the CPU over gloo; not to be closed."""
        key = (num_ranks, factory)
        if key not in self._sessions or not self._sessions[key].is_open:
            preload = PRELOAD if factory == RANK_FACTORY else ()
            self._sessions[key] = launch_local(
                num_ranks, factory=factory, preload=preload, timeout_seconds=60.0
            )
        return self._sessions[key]

    def close(self) -> None:
        for session in self._sessions.values():
            session.close()


@pytest.fixture(scope="session")
def pool() -> Iterator[WorkerPool]:
    workers = WorkerPool()
    yield workers
    workers.close()
