"""The ranks that a partitioned model runs on: given, or started when they are first needed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ..cost_models.presets import local_cluster
from ..runtime.launcher import (
    RANK_FACTORY,
    job_rank,
    job_size,
    launch_local,
    num_cores,
    spmd_session,
    under_torchrun,
)
from ..runtime.session import Arguments, LocalSession, Session
from .ir.cluster import Cluster, Device
from .ir.errors import UsageError

__all__ = [
    "Ranks",
    "calibration_session",
    "check_measurable",
    "job_cluster",
    "message_backend",
    "place_of",
    "profiling_session",
    "start_workers",
]

_CALIBRATOR_FACTORY = "cutset.runtime.calibrator:Calibrator"
_PROFILER_FACTORY = "cutset.runtime.profiler:Profiler"


class Ranks:
    """The session of one partitioned model.

    Args:
        cluster: on whose first devices local workers start.
        num_ranks: of the plan.
        timeout_seconds: longest wait of a rank for another.
        session: ranks that exist; None: start some.
        owns_session: `session` was started for this model, and ends with it.
    """

    def __init__(
        self,
        cluster: Cluster,
        num_ranks: int,
        timeout_seconds: float,
        session: Session | None = None,
        *,
        owns_session: bool = False,
    ) -> None:
        if session is not None and session.num_ranks != num_ranks:
            raise UsageError(
                f"the plan is for {num_ranks} ranks, the session has {session.num_ranks}",
                where="session",
                ways_out=(f"pass num_stages={session.num_ranks}", "pass a session of as many"),
            )
        self._cluster = cluster
        self._num_ranks = num_ranks
        self._timeout = timeout_seconds
        self._session = session
        self._owns_session = owns_session or session is None
        self._clean = self._owns_session
        self._closed = False

    @property
    def num_ranks(self) -> int:
        return self._num_ranks

    @property
    def session(self) -> Session:
        """The session, started and without what others have left on its ranks."""
        if self._closed:
            raise UsageError("this Parallel is closed", ways_out=("call auto_partition again",))
        if self._session is None:
            self._session = self._start()
        if not self._clean:
            self._clean = True
            self._session.call("reset")
        return self._session

    def call(self, method: str, arguments: Arguments = ()) -> list[Any]:
        """`Session.call`. The ranks' own waits end, and name their cause, before this one."""
        return self.session.call(method, arguments, timeout_seconds=2 * self._timeout)

    def _start(self) -> Session:
        if not self._cluster.local:
            raise UsageError(
                f"cluster {self._cluster.name!r} is not this machine: it is planned for, not run",
                ways_out=("pass a number of local devices", "start the script under torchrun"),
            )
        if under_torchrun():
            session = self._spmd()
            if session.num_ranks != self._num_ranks:
                raise UsageError(
                    f"the plan is for {self._num_ranks} ranks, the job has {session.num_ranks}",
                    ways_out=(f"pass devices={session.num_ranks}", "start as many processes"),
                )
            return session
        return start_workers(self._cluster, self._num_ranks, timeout_seconds=self._timeout)

    def _spmd(self) -> Session:
        """This job's session; where CUDA devices and CPUs are mixed, the cluster says which rank
        computes where."""
        backends = {self._cluster.type_of(d.index).backend for d in self._cluster.devices}
        if len(backends) == 1 or job_rank() >= len(self._cluster.devices):
            return spmd_session(timeout_seconds=self._timeout)
        return spmd_session(
            backend=message_backend(self._cluster, len(self._cluster.devices)),
            device=place_of(self._cluster, job_rank()),
            timeout_seconds=self._timeout,
        )

    def close(self) -> None:
        """End the session if it was started for this model."""
        if not self._closed and self._session is not None and self._owns_session:
            self._session.close()
        self._closed = True


def start_workers(
    cluster: Cluster,
    num_ranks: int,
    *,
    timeout_seconds: float,
    wait: bool = True,
    factory: str = RANK_FACTORY,
) -> LocalSession:
    """Workers on the first devices of a local cluster; see `launch_local`.

    CPU workers have the threads of their type.
    """
    types = [cluster.type_of(rank) for rank in range(num_ranks)]
    return launch_local(
        num_ranks,
        backend=message_backend(cluster, num_ranks),
        devices=[place_of(cluster, rank) for rank in range(num_ranks)],
        threads_per_rank=[entry.threads for entry in types],
        timeout_seconds=timeout_seconds,
        wait=wait,
        factory=factory,
    )


def message_backend(cluster: Cluster, num_ranks: int) -> str:
    """The backend of a job: NCCL where two ranks can use it (others of the job use gloo)."""
    on_cuda = sum(cluster.type_of(rank).backend == "cuda" for rank in range(num_ranks))
    return "nccl" if on_cuda > 1 or on_cuda == num_ranks else "gloo"


def place_of(cluster: Cluster, rank: int) -> torch.device:
    """Where a rank computes: on the CPU, or on the next CUDA device of its node."""
    if cluster.type_of(rank).backend != "cuda":
        return torch.device("cpu")
    node = cluster.devices[rank].node
    before = (device.index for device in cluster.devices[:rank] if device.node == node)
    return torch.device("cuda", sum(cluster.type_of(i).backend == "cuda" for i in before))


def job_cluster() -> Cluster:
    """This job's ranks under `torchrun`, node by node; outside of one all CUDA devices of this
    machine, else a CPU worker for every core."""
    if not under_torchrun():
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        return local_cluster(gpus or num_cores())
    count, in_node = job_size()
    cluster = local_cluster(in_node)
    devices = tuple(
        Device(index, cluster.types[0].name, f"node{index // in_node}") for index in range(count)
    )
    return replace(cluster, name=f"job-of-{count}", devices=devices)


def calibration_session(cluster: Cluster, *, timeout_seconds: float) -> Session:
    """Workers that measure the devices of `cluster`, or this job's ranks under `torchrun`."""
    if not under_torchrun():
        return start_workers(
            cluster,
            len(cluster.devices),
            timeout_seconds=timeout_seconds,
            factory=_CALIBRATOR_FACTORY,
        )
    session = spmd_session(timeout_seconds=timeout_seconds, factory=_CALIBRATOR_FACTORY)
    if session.num_ranks != len(cluster.devices):
        raise UsageError(
            f"{len(cluster.devices)} devices are to be measured, the job has {session.num_ranks}",
            ways_out=(f"pass --devices {session.num_ranks}", "start as many processes"),
        )
    return session


def check_measurable(cluster: Cluster) -> None:
    """Refuse to profile on devices that are not here.

    Raises:
        UsageError: the devices are not those of this machine.
    """
    if not cluster.local:
        raise UsageError(
            f"cluster {cluster.name!r} is not this machine: its devices cannot be measured",
            where="profile",
            ways_out=("pass profile='off'", "mark the cluster with local = true if it is"),
        )


def profiling_session(cluster: Cluster, *, timeout_seconds: float) -> LocalSession:
    """Workers on all devices of a local cluster that measure parts of graphs."""
    return start_workers(
        cluster,
        len(cluster.devices),
        timeout_seconds=timeout_seconds,
        factory=_PROFILER_FACTORY,
    )
