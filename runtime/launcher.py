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
from .service import WorkerSpec, load_factory
from .session import LocalSession
from .spmd import SpmdSession
from .stores import HostedStore, Store, environment_store, host_store, join_group, join_store
from .torch_communicator import TorchCommunicator

__all__ = [
    "PRELOAD",
    "RANK_FACTORY",
    "cache_directory",
    "fair_threads",
    "is_first_here",
    "job_rank",
    "job_size",
    "launch_local",
    "num_cores",
    "spmd_session",
    "under_torchrun",
]

RANK_FACTORY = "cutset.runtime.rank:Rank"
PRELOAD = ("torch._dynamo",)  # the first optimizer or make_fx of a process imports it (1.7 s)
_HOST = "127.0.0.1"
_OWN_SECONDS = 10.0  # longest wait of this process for a store that it serves itself
_WORKER_BYTES = 96 << 20  # that a worker has for itself before it has tensors


def under_torchrun() -> bool:
    """Whether this process was started as one rank of a job (by `torchrun` or the like)."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


def job_rank() -> int:
    """This process's rank in its job; 0 outside of one."""
    return int(os.environ["RANK"]) if under_torchrun() else 0


def is_first_here() -> bool:
    """Whether this process is the first rank of its job on this machine, or of no job."""
    return not under_torchrun() or _local_rank() == 0


def cache_directory() -> Path:
    """Where cutset keeps what it may lose: CUTSET_CACHE, else the user's directory for such."""
    own = os.environ.get("CUTSET_CACHE")
    if own:
        return Path(own)
    common = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(common) if os.path.isabs(common) else Path(os.path.expanduser("~")) / ".cache"
    return base / "cutset"


def job_size() -> tuple[int, int]:
    """Ranks of this job, and of it on this machine."""
    count = int(os.environ["WORLD_SIZE"])
    return count, int(os.environ.get("LOCAL_WORLD_SIZE", count))


def launch_local(
    num_ranks: int,
    *,
    backend: str = "gloo",
    devices: Sequence[torch.device] | None = None,
    threads_per_rank: int | Sequence[int | None] | None = None,
    timeout_seconds: float = 300.0,
    start_seconds: float = 120.0,
    master_port: int = 0,
    factory: str = RANK_FACTORY,
    preload: Sequence[str] = PRELOAD,
    wait: bool = True,
) -> LocalSession:
    """Start `num_ranks` workers on this machine and connect them.

    Args:
        backend: `gloo`, or `nccl` for messages between CUDA devices.
        devices: of the ranks, in order; default: the CPU for all.
        threads_per_rank: compute threads of a worker, for all alike or for each; default (and where
            a rank has None): cores shared evenly, and not more than OMP_NUM_THREADS where that is
            set.
        timeout_seconds: longest wait of a rank for another.
        start_seconds: longest time for all workers to be ready.
        master_port: TCP port where ranks find each other; 0: a free one.
        factory: `module:Class` of the rank objects, called as
            `Class(rank, num_ranks, device, communicator, timeout_seconds)`.
        preload: modules to import once for all workers, besides that of `factory`.
        wait: return when the workers are ready; False: at once, and the first call waits, so
            that the caller can plan while they start.

    Raises:
        UsageError: arguments contradict each other.
        RuntimeFailure: the port is in use, or a worker failed to start.
    """
    places = list(devices) if devices is not None else [torch.device("cpu")] * num_ranks
    if num_ranks < 1 or len(places) != num_ranks:
        raise UsageError(f"{len(places)} devices were given for {num_ranks} ranks")
    if backend not in ("gloo", "nccl"):
        raise UsageError(f"unknown backend {backend!r}", ways_out=("use 'gloo' or 'nccl'",))
    _check_room(num_ranks)
    each = (
        threads_per_rank
        if isinstance(threads_per_rank, Sequence)
        else [threads_per_rank] * num_ranks
    )
    if len(each) != num_ranks:
        raise UsageError(f"threads of {len(each)} ranks were given for {num_ranks} ranks")
    threads = [number or fair_threads(num_ranks) for number in each]
    store = _store(master_port, timeout_seconds)
    processes = WorkerProcesses(
        num_ranks, _environment(max(threads)), (*preload, factory.partition(":")[0])
    )
    specs = [
        WorkerSpec(
            rank=rank,
            num_ranks=num_ranks,
            device=str(device),
            backend=backend,
            store_host=_HOST,
            store_port=store.port,
            timeout_seconds=timeout_seconds,
            num_threads=threads[rank],
            factory=factory,
        )
        for rank, device in enumerate(places)
    ]
    session = LocalSession(processes, specs, keep_alive=store, start_seconds=start_seconds)
    if wait:
        session.wait_ready()
    return session


def spmd_session(
    *,
    backend: str | None = None,
    device: torch.device | None = None,
    timeout_seconds: float = 300.0,
    factory: str = RANK_FACTORY,
) -> SpmdSession:
    """The session of a process that `torchrun` has started as one rank; every rank calls this.

    Joins the job (unless the caller has initialised `torch.distributed`).

    Args:
        backend: default: `nccl` where ranks have CUDA devices of their own, else `gloo`.
        device: of this rank; default: the CUDA device with number LOCAL_RANK if there is one for
            every rank of this machine, else the CPU.
        timeout_seconds, factory: as in `launch_local`.

    Raises:
        UsageError: not started by `torchrun`.
        RuntimeFailure: the ranks do not find each other, or the port is in use.
    """
    if not under_torchrun():
        raise UsageError(
            "RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are not set",
            ways_out=("start the script with torchrun", "use local workers"),
        )
    place = device or _own_device()
    if place.type == "cuda":
        torch.cuda.set_device(place)
    store, gloo = _join(timedelta(seconds=timeout_seconds))
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    communicator = TorchCommunicator(
        rank,
        num_ranks,
        place,
        backend=backend or ("nccl" if place.type == "cuda" else "gloo"),
        store=store,
        gloo=gloo,
        timeout_seconds=timeout_seconds,
    )
    target = load_factory(factory)(rank, num_ranks, place, communicator, timeout_seconds)
    return SpmdSession(target, rank, num_ranks, communicator=communicator, store=store, gloo=gloo)


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", os.environ["RANK"]))


def _own_device() -> torch.device:
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    if torch.cuda.is_available() and torch.cuda.device_count() >= ranks_here:
        return torch.device("cuda", _local_rank())
    return torch.device("cpu")


def _join(limit: timedelta) -> tuple[Store, object]:
    """A store and a gloo group of all ranks (None: the default group)."""
    if not dist.is_initialized():
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        try:
            store, rank, num_ranks = environment_store(limit)
            join_group(store, rank, num_ranks, limit)
        except (RuntimeError, OSError) as error:
            raise RuntimeFailure(
                f"cannot join the job at {address}: {str(error).splitlines()[0]}",
                ways_out=("name a free MASTER_PORT", "check that all ranks were started"),
            ) from error
        return store, None
    gloo = dist.new_group(backend="gloo", timeout=limit)
    host = os.environ["MASTER_ADDR"]
    is_first = dist.get_rank() == 0
    own = host_store(host, 0, limit) if is_first else None
    port = [own.port if own is not None else 0]
    dist.broadcast_object_list(port, src=0, group=gloo)
    return own or join_store(host, port[0], limit), gloo


def _check_room(num_ranks: int) -> None:
    """Refuse workers that would take the memory of this machine from whatever runs on it."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    most = memory // _WORKER_BYTES
    if num_ranks > most:
        raise UsageError(
            f"{num_ranks} workers take {num_ranks * _WORKER_BYTES / 2**30:.0f} GiB before they "
            f"compute anything, this machine has {memory / 2**30:.0f}",
            ways_out=(f"use at most {most} workers here", "plan for more without running them"),
        )


def _store(port: int, timeout_seconds: float) -> HostedStore:
    """The meeting point of the ranks, hosted by this process."""
    try:
        # this process connects to what it serves, which takes no waiting for others
        store = host_store(_HOST, port, timedelta(seconds=max(timeout_seconds, _OWN_SECONDS)))
        store.set_timeout(timedelta(seconds=timeout_seconds))
        return store
    except (RuntimeError, OSError) as error:
        raise RuntimeFailure(
            f"port {port} of {_HOST} cannot be used: {str(error).splitlines()[0]}",
            ways_out=("leave master_port at 0, which takes a free port", "name another port"),
        ) from error


def num_cores() -> int:
    """Cores that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return cores or 1


def fair_threads(num_ranks: int) -> int:
    """Compute threads of each of `num_ranks` CPU workers, unless others are asked for: a fair share
    of the cores that this process may use."""
    share = max(1, num_cores() // num_ranks)
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    return min(share, int(wanted)) if wanted.isdigit() and int(wanted) > 0 else share


def _environment(threads: int) -> dict[str, str]:
    """This process's environment, in which the same modules are importable."""
    spec = find_spec("cutset")
    assert spec is not None and spec.origin is not None
    own = str(Path(spec.origin).absolute().parent.parent)
    paths = dict.fromkeys([*(str(Path(entry).absolute()) for entry in sys.path), own])
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    return {
        "GLOO_SOCKET_IFNAME": loopback,
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": str(threads),
    }
