"""Measure the devices and links at hand, and describe them as a cluster.

All devices are measured at the same time, as they run: they share memory and cores of their
machine. Compute is timed by the kernels of stages (`probes.py`), links by the communicator of the
runtime (`runtime/link_probes.py`); `cost_models/calibration.py` turns times into figures.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..cost_models.calibration import (
    OpTime,
    calls,
    fitted_curve,
    fitted_link,
    fitted_op_costs,
    fitted_optimizer,
    rounded,
    with_curves,
)
from ..cost_models.fits import Quality, Sample
from ..cost_models.presets import parse_devices
from ..runtime.launcher import is_first_here
from ..runtime.optimizer import describe_optimizer
from ..runtime.session import Session
from .calibrate_links import measured_links
from .codegen.python import emit_python
from .ir.cluster import PHASES, Cluster, DeviceType, Host, OpCost, RateCurve
from .ir.errors import UsageError
from .ir.graph import Mode
from .ir.text import print_program
from .probes import Probe, instruction_program, op_probes, rate_probes, tiny_probe, work_of
from .ranks import calibration_session, job_cluster
from .turns import measuring_turn

__all__ = ["FULL", "QUICK", "Calibration", "Effort", "calibrate", "local_devices"]

_TIMEOUT_SECONDS = 300.0
_MANY = 33  # operators with nothing to do, against one
_MICROBATCHES = 16
_SLOW_SECONDS = 0.2  # of a probe: the next larger one of its curve is left out
_SENSIBLE = 0.25  # of the rate of products in f32: so fast others are worth their figures
_OF_MEMORY = {"cpu": 0.7, "cuda": 0.95}
_OPTIMIZERS: tuple[tuple[str, Callable[..., torch.optim.Optimizer], float], ...] = (
    ("adamw", lambda group: torch.optim.AdamW(group, lr=1e-3), 2.0),
    ("sgd", lambda group: torch.optim.SGD(group, lr=1e-3, momentum=0.9), 1.0),
)
_OPTIMIZED = ((1 << 8, 16), (1 << 14, 8), (1 << 18, 4), (1 << 21, 2))  # (elements, tensors)
_MORE_ON_CUDA = ((1 << 24, 4),)  # more than caches hold


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is measured.

    Args:
        dtypes: of products, by backend.
        every: of the sizes of a curve, every how many-th.
        most: sizes of a curve.
        link_bytes: sizes of messages and collectives; ones over 32 MiB on CUDA only.
        rounds: how often transfers beside others, and beside computation, are made.
    """

    dtypes: tuple[tuple[str, tuple[str, ...]], ...]
    every: int
    most: int
    link_bytes: tuple[int, ...]
    rounds: int = 24


FULL = Effort(
    (("cpu", ("f32", "f64", "bf16")), ("cuda", ("f32", "bf16", "f16"))),
    every=1,
    most=12,
    link_bytes=tuple(1 << power for power in (12, 16, 18, 20, 22, 24, 26, 28)),
)
QUICK = Effort(
    (("cpu", ("f32",)), ("cuda", ("f32", "bf16"))),
    every=2,
    most=12,
    link_bytes=tuple(1 << power for power in (12, 16, 20, 24, 28)),
)


@dataclass(frozen=True, slots=True)
class Calibration:
    """What was measured.

    Args:
        cluster: the devices with figures as they were measured.
        qualities: of the fits of each device type, and of the links, by title.
        seconds: that it took.
    """

    cluster: Cluster
    qualities: tuple[tuple[str, tuple[Quality, ...]], ...]
    seconds: float


def local_devices(devices: str | None) -> Cluster:
    """The devices that are to be measured.

    Args:
        devices: as `--devices` of other verbs; None: the ranks of this job under `torchrun`, else
            all CUDA devices of this machine, else a CPU worker for every core.

    Raises:
        ClusterError: this machine does not have them.
        UsageError: they are none of this machine.
    """
    found = job_cluster() if devices is None else parse_devices(devices)
    if not found.local or any(entry.backend not in _OF_MEMORY for entry in found.types):
        raise UsageError(
            f"{devices} are not devices of this machine: they cannot be measured",
            where="--devices",
            ways_out=("give a number, cpu:2, cuda:2 or cuda:1+cpu:2",),
        )
    return found


def calibrate(
    cluster: Cluster, *, effort: Effort = FULL, progress: Callable[[str], None] = print
) -> Calibration:
    """Measure the devices of `cluster`, which are those of this machine or this job, when no other
    measurement runs here.

    Args:
        cluster: from `local_devices`; names, nodes and threads are kept, figures are replaced.
        effort: how much is measured.
        progress: is told what is being measured.

    Raises:
        UsageError: the job has another number of ranks.
        RuntimeFailure: a worker failed.
    """
    with measuring_turn(progress) if is_first_here() else nullcontext():
        began = time.monotonic()
        progress(f"starting {len(cluster.devices)} workers")
        session = calibration_session(cluster, timeout_seconds=_TIMEOUT_SECONDS)
        try:
            found = _Measuring(session, cluster, effort, progress).run()
        finally:
            session.close()
        return replace(found, seconds=time.monotonic() - began)


@dataclass(slots=True)
class _Type:
    """What is known of one device type so far."""

    kind: DeviceType
    ranks: tuple[int, ...]
    core_share: float = 1.0  # that a worker has of the time in which it computes
    call_seconds: float = 0.0
    qualities: list[Quality] = field(default_factory=list)

    @property
    def on_cuda(self) -> bool:
        return self.kind.backend == "cuda"


class _Measuring:
    """One calibration: every method measures something on all devices at once."""

    def __init__(
        self, session: Session, cluster: Cluster, effort: Effort, progress: Callable[[str], None]
    ) -> None:
        self._session = session
        self._cluster = cluster
        self._effort = effort
        self._progress = progress
        self._types = [
            _Type(entry, tuple(d.index for d in cluster.devices if d.type == entry.name))
            for entry in cluster.types
        ]

    def run(self) -> Calibration:
        self._shared()
        self._overhead()
        self._curves()
        self._ops()
        self._instructions()
        self._optimizers()
        self._hosts()
        kinds = tuple(entry.kind for entry in self._types)
        cluster = replace(self._cluster, types=kinds)
        qualities = [(entry.kind.name, tuple(entry.qualities)) for entry in self._types]
        if len(cluster.devices) > 1:
            cluster, found = measured_links(
                self._session,
                cluster,
                self._progress,
                self._effort.link_bytes,
                rounds=self._effort.rounds,
            )
            qualities.append(("links", found))
        return Calibration(cluster, tuple(qualities), 0.0)

    def _call(self, method: str, arguments: Any = ()) -> list[Any]:
        return self._session.call(method, arguments, timeout_seconds=_TIMEOUT_SECONDS)

    # -- device --------------------------------------------------------------------------------

    def _shared(self) -> None:
        """What devices have of their node: CPU workers share its memory and its cores."""
        rows = self._call("describe")
        for entry in self._types:
            share = []
            for rank in entry.ranks:
                node = rows[rank]["node"]
                on_cpu = [
                    device.index
                    for device in self._cluster.devices
                    if rows[device.index]["node"] == node
                    and self._cluster.type_of(device.index).backend == "cpu"
                ]
                sharing = 1 if entry.on_cuda else len(on_cpu)
                share.append(rows[rank]["memory_bytes"] / sharing)
            memory = int(_OF_MEMORY[entry.kind.backend] * min(share)) >> 20 << 20
            entry.kind = replace(entry.kind, memory_bytes=memory)
            if not entry.on_cuda:
                entry.kind = replace(entry.kind, cores=min(rows[r]["cores"] for r in entry.ranks))
        kinds = tuple(entry.kind for entry in self._types)
        cluster = replace(self._cluster, types=kinds)
        for entry in self._types:
            entry.core_share = min(map(cluster.core_share, entry.ranks))
            if entry.core_share == 1.0:  # nobody waits for them
                entry.kind = replace(entry.kind, cores=None)

    def _overhead(self) -> None:
        self._progress("issuing operators")
        one, many = (self._times([tiny_probe(count)] * len(self._types)) for count in (1, _MANY))
        for entry, first, second in zip(self._types, one, many, strict=True):
            overhead, entry.call_seconds = calls(first[0], second[0], _MANY)
            entry.kind = replace(entry.kind, overhead_seconds=overhead, curves=(), op_costs=())

    def _curves(self) -> None:
        curves: list[list[RateCurve]] = [[] for _ in self._types]
        for kind in ("memory", "matmul", "attention", "convolution"):
            self._progress(f"rates of {kind}" + (" by element type" if kind == "matmul" else ""))
            for position in range(3):
                found = self._measure([self._curve_probes(e, kind, position) for e in self._types])
                for entry, own, rows in zip(self._types, curves, found, strict=True):
                    if rows:
                        own.append(self._fit_curve(entry, kind, rows))
        for entry, own in zip(self._types, curves, strict=True):
            entry.kind = with_curves(entry.kind, own)

    def _curve_probes(self, entry: _Type, kind: str, position: int) -> list[Probe]:
        """Probes of the element type at `position`, if `entry` is measured in one there."""
        dtypes = dict(self._effort.dtypes)[entry.kind.backend]
        if kind in ("memory", "convolution"):
            dtypes = dtypes[:1]
        elif kind == "attention":
            dtypes = tuple(dtype for dtype in dtypes if dtype != "f64")
        if position >= len(dtypes):
            return []
        probes = rate_probes(kind, dtypes[position], on_cuda=entry.on_cuda)
        return self._some(list(probes))

    def _some(self, probes: list[Probe]) -> list[Probe]:
        return probes[:: self._effort.every][: self._effort.most]

    def _fit_curve(
        self, entry: _Type, kind: str, rows: list[tuple[Probe, tuple[float, ...]]]
    ) -> RateCurve:
        samples = []
        for probe, seconds in rows:
            for phase, work in enumerate(work_of(probe)):
                if phase in probe.phases:
                    size = work.num_bytes if kind == "memory" else work.flops
                    samples.append((size, self._each(entry, probe, seconds[phase])))
        dtype = "" if kind == "memory" else rows[0][0].dtype
        curve, quality = fitted_curve(kind, dtype, samples, entry.kind.overhead_seconds)
        entry.qualities.append(quality)
        return curve

    def _each(self, entry: _Type, probe: Probe, seconds: float) -> float:
        """Seconds of one operator of a phase; the call around them is not its."""
        return max(seconds - entry.call_seconds, 0.5 * seconds) / probe.repeats

    def _ops(self) -> None:
        self._progress("kinds of operators")
        times: list[list[OpTime]] = [[] for _ in self._types]
        kinds = [op_probes("f32", on_cuda=entry.on_cuda) for entry in self._types]
        for lists in zip(*kinds, strict=True):
            found = self._measure([self._some(probes) for probes in lists])
            for entry, own, rows in zip(self._types, times, found, strict=True):
                own += self._op_times(entry, rows, "")
        halves = [self._half(entry) for entry in self._types]
        if any(halves):
            self._progress(f"kinds of operators in {', '.join(sorted({*filter(None, halves)}))}")
        kinds = [
            op_probes(half or "f32", on_cuda=entry.on_cuda)
            for entry, half in zip(self._types, halves, strict=True)
        ]
        for lists in zip(*kinds, strict=True) if any(halves) else ():
            found = self._measure(
                [
                    self._some(probes[:1] + probes[2:]) if half else []
                    for half, probes in zip(halves, lists, strict=True)
                ]
            )
            for entry, own, rows, half in zip(self._types, times, found, halves, strict=True):
                own += self._op_times(entry, rows, half)
        for entry, own in zip(self._types, times, strict=True):
            costs, qualities = fitted_op_costs(entry.kind, own)
            # the curve of convolutions has all that they take
            costs += tuple(OpCost("convolution", phase, 1.0) for phase in PHASES)
            entry.kind = replace(entry.kind, op_costs=costs)
            entry.qualities += qualities

    def _half(self, entry: _Type) -> str:
        """The element type of half precision that `entry` computes with at a sensible speed, which
        stands for both; empty: none."""
        dtypes = dict(self._effort.dtypes)[entry.kind.backend]
        rates = dict(entry.kind.flops_per_second)
        return next(
            (d for d in ("bf16", "f16") if d in dtypes and rates[d] >= _SENSIBLE * rates["f32"]), ""
        )

    def _op_times(
        self, entry: _Type, rows: list[tuple[Probe, tuple[float, ...]]], dtype: str
    ) -> list[OpTime]:
        return [
            OpTime(
                probe.name,
                PHASES[phase],
                work.num_bytes,
                self._each(entry, probe, seconds[phase]),
                dtype,
            )
            for probe, seconds in rows
            for phase, work in enumerate(work_of(probe))
            if work.num_bytes > 0.0
        ]

    def _measure(self, lists: Sequence[list[Probe]]) -> list[list[tuple[Probe, tuple[float, ...]]]]:
        """Times of the probes of each type, from small to large, until they take long."""
        rows: list[list[tuple[Probe, tuple[float, ...]]]] = [[] for _ in lists]
        left = [list(probes) for probes in lists]
        while any(left):
            idle = tiny_probe(1)
            now = [own[0] if own else idle for own in left]
            for index, seconds in enumerate(self._times(now)):
                if not left[index]:
                    continue
                rows[index].append((left[index].pop(0), seconds))
                if sum(seconds) > _SLOW_SECONDS:
                    left[index].clear()
        return rows

    def _times(self, probes: Sequence[Probe]) -> list[tuple[float, ...]]:
        """Seconds of the phases of one probe for each type, medians over its devices."""
        given = [
            {
                "program": print_program(probe.program),
                "source": emit_python(probe.program),
                "copies": probe.copies,
                "compile": False,
                "cuda_graphs": entry.on_cuda,
            }
            for entry, probe in zip(self._types, probes, strict=True)
        ]
        return self._call_types("time_block", given)

    def _call_types(
        self, method: str, arguments: Sequence[dict[str, Any]]
    ) -> list[tuple[float, ...]]:
        """Call with `arguments` of each type; of the times that its devices answer, in which they
        compute, the medians while all do."""
        by_rank = {
            rank: given
            for entry, given in zip(self._types, arguments, strict=True)
            for rank in entry.ranks
        }
        found = self._call(method, [by_rank[rank] for rank in sorted(by_rank)])
        return [
            tuple(seconds / entry.core_share for seconds in _medians(found[r] for r in entry.ranks))
            for entry in self._types
        ]

    # -- host ----------------------------------------------------------------------------------

    def _instructions(self) -> None:
        self._progress("instructions")
        program = instruction_program(Mode.TRAIN, _MICROBATCHES, 1 << 30)
        arguments = {"program": print_program(program), "source": emit_python(program)}
        found = self._call("time_instructions", arguments)
        for entry in self._types:
            seconds = statistics.median(found[rank] for rank in entry.ranks) / entry.core_share
            if not entry.on_cuda:  # there the host goes on while operators run
                # each of three instructions issues about two operators
                left = seconds - 2 * entry.kind.overhead_seconds
                seconds = max(left, seconds / 4)
            entry.kind = replace(entry.kind, instruction_seconds=rounded(seconds))

    def _optimizers(self) -> None:
        self._progress("optimizers")
        for name, make, states in _OPTIMIZERS:
            parameter = torch.nn.Parameter(torch.zeros(1))
            spec = describe_optimizer(make([parameter]), {id(parameter): "p"})
            sizes = [self._optimized(entry) for entry in self._types]
            found = self._call_types(
                "time_optimizer", [{"spec": spec, "sizes": own} for own in sizes]
            )
            for entry, own, times in zip(self._types, sizes, found, strict=True):
                samples = []
                for (elements, count), seconds in zip(own, times, strict=True):
                    at_once = count if entry.on_cuda else 1
                    moved = 4.0 * elements * at_once * (4 + 2 * states)
                    samples.append((moved, seconds * at_once / count))
                cost, quality = fitted_optimizer(entry.kind, name, samples)
                entry.kind = replace(entry.kind, op_costs=(*entry.kind.op_costs, cost))
                entry.qualities.append(quality)

    def _optimized(self, entry: _Type) -> tuple[tuple[int, int], ...]:
        """(elements, tensors) that optimizers update."""
        more = _MORE_ON_CUDA if entry.on_cuda else ()
        return (*_OPTIMIZED, *more)[:: self._effort.every]

    def _hosts(self) -> None:
        """The host of accelerators, where optimizer states may lie."""
        if not any(entry.on_cuda for entry in self._types):
            return
        self._progress("memory of the host")
        rows = self._call("time_host")
        for entry in self._types:
            if entry.on_cuda:
                entry.kind = replace(entry.kind, host=self._host(entry, rows))

    def _host(self, entry: _Type, rows: list[dict[str, list[tuple[int, float]]]]) -> Host:
        samples = [
            Sample(1.0, float(size), seconds)
            for rank in entry.ranks
            for way in ("down", "up")
            for size, seconds in rows[rank][way]
        ]
        link, quality = fitted_link(samples, "host")
        entry.qualities.append(quality)
        rates = [
            2.0 * rows[rank]["host"][-1][0] / rows[rank]["host"][-1][1] for rank in entry.ranks
        ]
        memory = entry.kind.host.memory_bytes if entry.kind.host is not None else 1 << 34
        return Host(link, memory >> 20 << 20, rounded(statistics.median(rates)))


def _medians(rows: Iterable[Sequence[float]]) -> tuple[float, ...]:
    return tuple(map(statistics.median, zip(*rows, strict=True)))
