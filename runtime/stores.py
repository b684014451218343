"""Key-value stores where ranks find each other, typed (torch exports them without types)."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, Protocol, cast

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

__all__ = ["HostedStore", "Store", "environment_store", "host_store", "join_group", "join_store"]


class Store(Protocol):
    """What is used of `torch.distributed.Store`; all errors are RuntimeError."""

    def set(self, key: str, value: str | bytes) -> None: ...

    def get(self, key: str) -> bytes: ...

    def check(self, keys: list[str]) -> bool: ...

    def wait(self, keys: list[str], timeout: timedelta) -> None: ...

    def set_timeout(self, timeout: timedelta) -> None: ...


class HostedStore(Store, Protocol):
    @property
    def port(self) -> int: ...


def host_store(host: str, port: int, limit: timedelta) -> HostedStore:
    """A store served by this process as long as it is referenced; port 0 takes a free one.

    Raises:
        RuntimeError: the port cannot be used.
    """
    store = dist.TCPStore(  # type: ignore[attr-defined]
        host, port, is_master=True, wait_for_workers=False, timeout=limit
    )
    return cast(HostedStore, store)


def join_store(host: str, port: int, limit: timedelta) -> Store:
    """A connection to the store that another process hosts."""
    store = dist.TCPStore(host, port, is_master=False, timeout=limit)  # type: ignore[attr-defined]
    return cast(Store, store)


def environment_store(limit: timedelta) -> tuple[Store, int, int]:
    """Store, rank and number of ranks of the job that `torchrun` described in the environment.

    The store outlives sessions, so each session of a job has keys of its own.
    """
    store, rank, num_ranks = next(rendezvous("env://", timeout=limit))
    session = store.add(f"cutset/sessions/{rank}", 1)
    return _prefixed(store, f"cutset/{session}"), rank, num_ranks


def join_group(store: Store, rank: int, num_ranks: int, limit: timedelta) -> None:
    """Make the default process group: gloo over all ranks. Keys of `store` stay apart."""
    dist.init_process_group(
        "gloo",
        store=cast(Any, _prefixed(store, "group")),
        rank=rank,
        world_size=num_ranks,
        timeout=limit,
    )


def _prefixed(store: Any, prefix: str) -> Store:
    return cast(Store, dist.PrefixStore(prefix, store))  # type: ignore[attr-defined]
