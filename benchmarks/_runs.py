"""A model under a plan: planned, simulated, run on workers, and how long its steps really took.

Planning takes seconds a plan and a core; `Planners` spread it over processes, which rest while
steps are measured. Workers are started once for each number of ranks, and forget one model before
the next.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import multiprocessing
import os
import pickle
import re
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import gpu_llama
import torch
from _cores import pin_workers, separate_cores, unpin_workers
from _workloads import ON_CPU, ON_CUDA, Workload
from torch import nn

from cutset.compiler.api import plan_model
from cutset.compiler.calibrate import calibrate, local_devices
from cutset.compiler.calibration_text import calibration_file
from cutset.compiler.ir.cluster import Cluster
from cutset.compiler.ir.errors import CutsetError
from cutset.compiler.ir.trace import TraceEvent
from cutset.compiler.parallel import Parallel, RunOptions
from cutset.compiler.planned import PlannedModel
from cutset.compiler.ranks import start_workers
from cutset.cost_models import parse_devices, simulate
from cutset.cost_models.simulator import Simulation
from cutset.runtime.session import LocalSession

__all__ = [
    "VARIANTS",
    "WARM_UP",
    "Case",
    "Measured",
    "Planned",
    "Planners",
    "Workers",
    "add_options",
    "by_devices",
    "measure_memory",
    "phase_seconds",
    "record_trace",
    "say",
]

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"compile": False, "cuda_graphs": False},
    "eager": {"compile": False, "cuda_graphs": True},
    "compiled": {"compile": True, "cuda_graphs": True},
}
WARM_UP = 2  # steps of a round in which caches and the allocator settle


@dataclass(frozen=True, slots=True)
class Case:
    """A model, a plan by its name, and how it runs.

    Args:
        plan: a mesh or `auto`, then pinned decisions.
        variant: one of `VARIANTS`; blocks are measured so, too.

    `data=2`, `data=2,pipeline=2:zero=1`, `pipeline=4:microbatches=8:schedule=gpipe`, `auto`.
    """

    model: str
    devices: int
    plan: str
    variant: str = "plain"

    def pinned(self) -> dict[str, Any]:
        """Arguments of `plan_model`."""
        mesh, *decisions = self.plan.split(":")
        found: dict[str, Any] = {} if mesh == "auto" else {"mesh": mesh}
        for decision in decisions:
            name, _, value = decision.partition("=")
            name = "num_microbatches" if name == "microbatches" else name
            found[name] = int(value) if value.isdigit() else value
        return found

    def __str__(self) -> str:
        return f"{self.model} on {self.devices}, {self.plan}"


@dataclass(frozen=True, slots=True)
class Planned:
    """A case with its plan and its simulated step; or, of one that has none, why."""

    case: Case
    planned: PlannedModel | None
    simulation: Simulation | None
    seconds: float
    error: str = ""


def workload(name: str, backend: str) -> Workload:
    """The model called `name`, the same values each time."""
    torch.manual_seed(0)
    return (ON_CPU if backend == "cpu" else ON_CUDA)[name]()


def optimizer(parameters: Any) -> torch.optim.Optimizer:
    """AdamW, in one kernel for all parameters on CUDA."""
    listed = list(parameters)
    on_cuda = listed[0].dtype is torch.bfloat16
    return torch.optim.AdamW(listed, lr=1e-4, fused=on_cuda or None)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of every benchmark that plans in processes and runs on workers."""
    parser.add_argument("--profile", choices=("off", "blocks", "ops"), default="off")
    parser.add_argument(
        "--cluster", help="a cluster file of as many devices at least; default: calibrate"
    )
    parser.add_argument(
        "--cores",
        type=lambda text: tuple(int(number) for number in text.split(",")),
        help="processors to use, workers first; default: one of each core, as the system says",
    )
    parser.add_argument(
        "--jobs", type=int, help="plans made at once; default: as many as have cores"
    )


def by_devices(
    cases: Iterable[Case], options: argparse.Namespace, backend: str
) -> Iterator[tuple[list[Case], Workers, Planners]]:
    """Cases on so many devices, with workers and planners for them: one number after the other.

    Devices are those of the file asked for, or those of this machine, which are calibrated: figures
    of two workers are not those of four. This process and those that it starts keep to the
    processors asked for from now on. Where blocks are measured, no two plans share a core.
    """
    torch.set_num_threads(1)
    if backend == "cpu":
        os.sched_setaffinity(0, options.cores or separate_cores())
    ordered = sorted(cases, key=lambda case: case.devices)
    for count, group in itertools.groupby(ordered, key=lambda case: case.devices):
        own = count if options.profile != "off" else 1
        jobs = options.jobs or max(1, len(os.sched_getaffinity(0)) // own - 1)
        cluster = _cluster(options.cluster, backend, count, options.json)
        with (
            Workers(cluster, options.cores) as workers,
            Planners(cluster, options.profile, jobs) as planners,
        ):
            yield list(group), workers, planners


def _cluster(file: str | None, backend: str, devices: int, output: Path) -> Cluster:
    """The first `devices` of a file, or those of this machine; figures go beside `output`."""
    if file is not None:
        whole = parse_devices(file)
        if len(whole.devices) < devices:
            sys.exit(f"{file} has {len(whole.devices)} devices, {devices} are asked for")
        if len(whole.devices) > devices and any(kind.cores for kind in whole.types):
            sys.exit(f"{file}: workers share cores: leave --cluster out, or calibrate {devices}")
        return replace(whole, devices=whole.devices[:devices])
    found = calibrate(local_devices(f"{backend}:{devices}"), progress=say)
    output.parent.mkdir(parents=True, exist_ok=True)
    path = output.with_name(f"cluster-{devices}.toml")
    path.write_text(calibration_file(found, format="toml"))
    say(f"calibrated in {found.seconds:.0f} s: {path}")
    return found.cluster


def say(line: str) -> None:
    """Tell of progress."""
    print(line, file=sys.stderr, flush=True)


def plan_one(case: Case, cluster: Cluster, profile: str) -> Planned:
    """Plan and simulate."""
    began = time.perf_counter()
    backend = cluster.types[0].backend
    work = workload(case.model, backend)
    extra = {} if profile == "off" else {"profile": profile, **VARIANTS[case.variant]}
    try:
        planned = plan_model(
            work.model,
            cluster,
            example_inputs=work.args,
            example_kwargs=work.kwargs,
            loss_fn=work.loss_fn,
            check=False,
            **case.pinned(),
            **extra,
        )
    except CutsetError as error:
        return Planned(case, None, None, time.perf_counter() - began, str(error))
    simulation = simulate(
        planned.programs, cluster=planned.plan.cluster, optimizer=planned.plan.optimizer
    )
    return Planned(case, planned, simulation, time.perf_counter() - began)


class Planners(contextlib.ExitStack):
    """Plans cases by `jobs` processes that stay for the next ones; they end with the context.

    What they measure they keep for each other alone: times of another hour would tell of this
    machine as it was.
    """

    def __init__(self, cluster: Cluster, profile: str, jobs: int) -> None:
        super().__init__()
        self._cluster, self._profile = cluster, profile
        cache = self.enter_context(tempfile.TemporaryDirectory(prefix="cutset-"))
        self.enter_context(mock.patch.dict(os.environ, CUTSET_CACHE=cache))
        self._pool = None
        if jobs > 1:
            context = multiprocessing.get_context("spawn")
            self._pool = self.enter_context(ProcessPoolExecutor(jobs, context, _one_thread))

    def plan(self, cases: Sequence[Case]) -> list[Planned]:
        """`plan_one` of each, in their order."""
        found = []
        for planned in self._planned(cases):
            say(f"{planned.case}: {planned.error or f'planned in {planned.seconds:.1f} s'}")
            found.append(planned)
        return found

    def _planned(self, cases: Sequence[Case]) -> Iterator[Planned]:
        if self._pool is None:
            yield from (plan_one(case, self._cluster, self._profile) for case in cases)
            return
        count = len(cases)
        options = [self._cluster] * count, [self._profile] * count
        yield from map(pickle.loads, self._pool.map(_plan_in_bytes, cases, *options))


def _plan_in_bytes(case: Case, cluster: Cluster, profile: str) -> bytes:
    """`plan_one`, pickled here: torch would pass every tensor by an open file of its own."""
    return pickle.dumps(plan_one(case, cluster, profile))


def _one_thread() -> None:
    torch.set_num_threads(1)


class Workers(contextlib.ExitStack):
    """Sessions on the first devices of a cluster; they end with the context.

    CPU workers have one thread, and a core of their own where there are enough.
    """

    def __init__(self, cluster: Cluster, cores: Sequence[int] | None = None) -> None:
        super().__init__()
        self._cluster = replace(
            cluster, types=tuple(_of_one_thread(entry) for entry in cluster.types), local=True
        )
        self._sessions: dict[tuple[int, int], LocalSession] = {}
        allowed = cores or sorted(os.sched_getaffinity(0))
        count = len(cluster.devices)
        on_cpu = all(entry.backend == "cpu" for entry in cluster.types)
        self.cores = tuple(allowed[:count]) if on_cpu and len(allowed) >= 2 * count else ()

    def session(self, num_ranks: int, number: int = 0) -> LocalSession:
        """Workers for so many ranks, the same for the same `number`; others, if one has failed."""
        found = self._sessions.get((num_ranks, number))
        if found is None or not found.is_open:
            found = start_workers(self._cluster, num_ranks, timeout_seconds=120.0, wait=False)
            self._sessions[num_ranks, number] = found
            self.callback(found.close)
        return found

    def parallel(self, planned: PlannedModel, number: int = 0, **options: Any) -> Parallel:
        """`planned`, after its first step: values, kernels and connections are there."""
        weights = gpu_llama.initial if _is_on_meta(planned.model) else None
        run = RunOptions(loss_fn=planned.loss_fn, optimizer=optimizer, weights=weights, **options)
        session = self.session(len(planned.programs), number)
        parallel = Parallel(planned, run, session)
        args, kwargs = planned.call
        if self.cores:
            unpin_workers(session.process_ids)
        parallel.train_step(*args, **kwargs)  # loads, traces and connects
        if self.cores:
            pin_workers(session.process_ids, self.cores)
        return parallel


def _is_on_meta(model: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in model.parameters())


def _of_one_thread(entry: Any) -> Any:
    return replace(entry, threads=1) if entry.backend == "cpu" else entry


@dataclass(frozen=True, slots=True)
class Measured:
    """Seconds of warm steps, as the caller of `train_step` sees them."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def measure_memory(parallel: Parallel, planned: PlannedModel) -> list[int]:
    """Peak bytes of every rank in one more step, by the allocator's events."""
    args, kwargs = planned.call
    parallel.measure_memory()
    parallel.train_step(*args, **kwargs)
    return parallel.peak_memory_bytes()


def record_trace(parallel: Parallel, planned: PlannedModel) -> tuple[TraceEvent, ...]:
    """What the ranks did in one more step."""
    args, kwargs = planned.call
    parallel.record_trace()
    parallel.train_step(*args, **kwargs)
    return parallel.trace()


def phase_seconds(events: Iterable[TraceEvent], num_ranks: int) -> dict[str, float]:
    """Seconds a rank by what is done: `F`, `I`, `W`, `OptimizerStep`, `send`, `AllReduce`, ..."""
    found: dict[str, float] = defaultdict(float)
    for event in events:
        kind = re.split(r"[ .]", event.name)[0]
        found[kind] += (event.end_seconds - event.begin_seconds) / num_ranks
    return dict(found)
