"""Starts sessions: local workers of this process, or one rank per process under `torchrun`.

The only place of cutset that reads the environment.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.distributed as dist

from ..compiler.ir.errors import RuntimeFailure, UsageError
from .processes import WorkerProcesses
from .service import WorkerSpec
from .session import LocalSession

__all__ = ["RANK_FACTORY", "launch_local", "under_torchrun"]

RANK_FACTORY = "cutset.runtime.rank:Rank"
_PRELOAD = ("torch._dynamo",)  # the first optimizer or make_fx of a process imports it (1.7 s)
_HOST = "127.0.0.1"


def under_torchrun() -> bool:
    """Whether this process was started as one rank of a job (by `torchrun` or the like)."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


def launch_local(
    num_ranks: int,
    *,
    backend: str = "gloo",
    devices: Sequence[torch.device] | None = None,
    threads_per_rank: int | None = None,
    timeout_seconds: float = 300.0,
    start_seconds: float = 120.0,
    master_port: int = 0,
    factory: str = RANK_FACTORY,
) -> LocalSession:
    """Start `num_ranks` workers on this machine and connect them.

    Args:
        backend: `gloo`, or `nccl` for messages between CUDA devices.
        devices: of the ranks, in order; default: the CPU for all.
        threads_per_rank: compute threads of a worker; default: cores shared evenly, and not more
            than OMP_NUM_THREADS where that is set.
        timeout_seconds: longest wait of a rank for another.
        start_seconds: longest time for all workers to be ready.
        master_port: TCP port where ranks find each other; 0: a free one.
        factory: `module:Class` of the rank objects, called as
            `Class(rank, num_ranks, device, communicator, timeout_seconds)`.

    Raises:
        UsageError: arguments contradict each other.
        RuntimeFailure: the port is in use, or a worker failed to start.
    """
    places = list(devices) if devices is not None else [torch.device("cpu")] * num_ranks
    if num_ranks < 1 or len(places) != num_ranks:
        raise UsageError(f"{len(places)} devices were given for {num_ranks} ranks")
    if backend not in ("gloo", "nccl"):
        raise UsageError(f"unknown backend {backend!r}", ways_out=("use 'gloo' or 'nccl'",))
    threads = threads_per_rank or _threads(num_ranks)
    store = _store(master_port, timeout_seconds)
    processes = WorkerProcesses(
        num_ranks, _environment(threads), (*_PRELOAD, factory.partition(":")[0])
    )
    session = LocalSession(processes, keep_alive=store)
    specs = [
        WorkerSpec(
            rank=rank,
            num_ranks=num_ranks,
            device=str(device),
            backend=backend,
            store_host=_HOST,
            store_port=store.port,
            timeout_seconds=timeout_seconds,
            num_threads=threads,
            factory=factory,
        )
        for rank, device in enumerate(places)
    ]
    session.request([("start", spec) for spec in specs], "start", start_seconds)
    return session


def _store(port: int, timeout_seconds: float) -> dist.TCPStore:
    """The meeting point of the ranks, hosted by this process."""
    try:
        return dist.TCPStore(
            _HOST,
            port,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=timeout_seconds),
        )
    except (RuntimeError, OSError) as error:
        raise RuntimeFailure(
            f"port {port} of {_HOST} cannot be used: {str(error).splitlines()[0]}",
            ways_out=("leave master_port at 0, which takes a free port", "name another port"),
        ) from error


def _threads(num_ranks: int) -> int:
    """Fair share of the cores that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    share = max(1, (cores or 1) // num_ranks)
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    return min(share, int(wanted)) if wanted.isdigit() and int(wanted) > 0 else share


def _environment(threads: int) -> dict[str, str]:
    """This process's environment, in which the same modules are importable."""
    spec = find_spec("cutset")
    assert spec is not None and spec.origin is not None
    own = str(Path(spec.origin).absolute().parent.parent)
    paths = dict.fromkeys([own, *(str(Path(entry).absolute()) for entry in sys.path)])
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    return {
        "GLOO_SOCKET_IFNAME": loopback,
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": str(threads),
    }
