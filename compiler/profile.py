"""Measure the operators of a captured graph, and messages, on the devices that are to run it.

One worker for each device, all at the same time, as they will run. First every node is measured on
every type of device, then, where operators have been placed, those of each device once more in
place: no other nodes run beside them, so that caches and memory are shared as in the stream. A
machine has slow moments of any length, so measurements are of several short turns, of which the
median counts; several placements have their turns one after the other, so that they share good
moments and bad ones. Times are kept in the user's cache (`profile_database.py`); where devices are
of one type the mean of their figures counts.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from ..passes.context import Measured
from ..runtime.session import Session
from .capture import Captured
from .codegen.cut import cut_stages
from .codegen.python import emit_python
from .hardware import hardware_of
from .ir.cluster import Cluster, Link
from .ir.errors import WorkerLost
from .ir.plan import Plan, Stage
from .ir.program import Program
from .ir.text import print_program
from .probes import instruction_program
from .profile_database import BlockKey, Measurement, ProfileDatabase, Record
from .ranks import check_measurable, profiling_session
from .turns import measuring_turn

__all__ = ["NodeTimes", "NotMeasured"]

_TURNS = 4
_TURN_SECONDS = 0.5  # at least, for which every worker measures
_MICROBATCHES = 16  # of a program that measures instructions
_TIMEOUT_SECONDS = 300.0

Rows = list[tuple[float, ...]]
_Measure = Callable[[Session], list[Sequence[float] | str]]


class NotMeasured(Exception):
    """The memory of a device does not suffice, in words."""


class NodeTimes:
    """Times of the nodes of one graph on the devices of a cluster.

    Workers start when something is first measured that the database does not have.

    Args:
        database: where times are looked up and kept.
        say: is told if another measurement has to end first.
        cuda_graphs: whether stages will be replayed as CUDA graphs.

    Raises:
        UsageError: the devices are not those of this machine.
    """

    def __init__(
        self,
        captured: Captured,
        cluster: Cluster,
        database: ProfileDatabase,
        say: Callable[[str], None],
        cuda_graphs: bool = True,
    ) -> None:
        check_measurable(cluster)
        self._graph = captured.graph
        self._cluster = cluster
        self._database = database
        self._say = say
        self._cuda_graphs = cuda_graphs
        self._core_shares = [cluster.core_share(device.index) for device in cluster.devices]
        self._hardware = [hardware_of(cluster, device.index) for device in cluster.devices]
        self._session: Session | None = None
        graph = captured.graph
        stages = cut_stages(graph, tuple(Stage(n.id, (0,), (n.id,)) for n in graph.nodes))
        self._whole = Program.unscheduled(graph.mode, stages)
        self._everywhere: Measured | None = None

    def everywhere(self) -> Measured:
        """Seconds of every node on every type of device, and of messages.

        Raises:
            NotMeasured: the memory of a device does not suffice.
            RuntimeFailure: a worker failed.
        """
        if self._everywhere is None:
            (rows,) = self._timed([[self._whole] * len(self._cluster.devices)])
            links = {
                name: Link(latency, 1.0 / per_byte if per_byte > 0 else math.inf)
                for name, (latency, per_byte) in self._by_type(self._messages()).items()
            }
            asking = {name: row[0] for name, row in self._by_type(self._instructions()).items()}
            found = self._by_type(rows)
            self._everywhere = Measured(
                {name: row[:-1] for name, row in found.items()},
                links,
                asking,
                {name: row[-1] for name, row in found.items()},
            )
        return self._everywhere

    def in_place(self, plans: Sequence[Plan]) -> list[Measured]:
        """The same for each plan, with what the nodes that it has placed take where they are.

        On a type of device, nodes that are on none of its devices take as much more or less than
        measured everywhere as those take together that are.

        Args:
            plans: measured in turns.

        Raises:
            NotMeasured: the memory of a device does not suffice.
            RuntimeFailure: a worker failed.
        """
        before = self.everywhere()
        devices = [device.index for device in self._cluster.devices]
        runs = [[self._own(plan, device) for device in devices] for plan in plans]
        return [
            self._with_own(before, programs, rows)
            for programs, rows in zip(runs, self._timed(runs), strict=True)
        ]

    def _with_own(self, before: Measured, programs: Sequence[Program], rows: Rows) -> Measured:
        """`before` with the times of the nodes of each device's program."""
        found: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
        unsteady: dict[str, list[float]] = defaultdict(list)
        for device, program, row in zip(self._cluster.devices, programs, rows, strict=True):
            for stage, seconds in zip(program.stages, row[:-1], strict=True):
                found[device.type][stage.index].append(seconds)
            if program.stages:
                unsteady[device.type].append(row[-1])
        return replace(
            before,
            nodes={name: _corrected(row, found[name]) for name, row in before.nodes.items()},
            unsteady={**before.unsteady, **{k: statistics.mean(v) for k, v in unsteady.items()}},
        )

    def close(self) -> None:
        """End the workers."""
        if self._session is not None:
            self._session.close()
            self._session = None

    def _own(self, plan: Plan, device: int) -> Program:
        """Nodes of one device in the order in which they run, one a stage."""
        order = [node for stage in plan.stages if stage.device == device for node in stage.nodes]
        stages = tuple(self._whole.stages[node] for node in dict.fromkeys(order))
        return replace(self._whole, stages=stages)

    def _timed(self, runs: Sequence[Sequence[Program]]) -> list[Rows]:
        """For each run, a program for every device at the same time, the seconds of their nodes and
        how unsteady they are."""
        texts = [[print_program(program) for program in programs] for programs in runs]
        together = [_together(self._hardware, row) for row in texts]
        turns = "\n".join(sorted(together))
        keys = [
            self._key(Measurement.NODES, f"{text}\n{beside}\n{turns}", device)
            for row, beside in zip(texts, together, strict=True)
            for device, text in enumerate(row)
        ]
        counts = [len(program.stages) for programs in runs for program in programs]
        found = self._known(keys, counts, lambda session: self._in_turns(session, runs, texts))
        size = len(self._cluster.devices)
        return [found[at : at + size] for at in range(0, len(found), size)]

    def _in_turns(
        self, session: Session, runs: Sequence[Sequence[Program]], texts: Sequence[Sequence[str]]
    ) -> list[Sequence[float] | str]:
        """Of every run and device, medians over turns; or the first reason why there are none."""
        arguments = [
            [
                {
                    "program": text,
                    "source": emit_python(program),
                    "seconds": _TURN_SECONDS,
                    "cuda_graphs": self._cuda_graphs,
                }
                for text, program in zip(row, programs, strict=True)
            ]
            for row, programs in zip(texts, runs, strict=True)
        ]
        turns: list[list[Sequence[float] | str]] = [
            [
                row
                for own in arguments
                for row in session.call("time_nodes", own, timeout_seconds=_TIMEOUT_SECONDS)
            ]
            for _ in range(_TURNS)
        ]
        return [_medians(rows) for rows in zip(*turns, strict=True)]

    def _instructions(self) -> Rows:
        """Of each device, seconds of an instruction."""
        count = len(self._cluster.devices)
        program = instruction_program(self._graph.mode, _MICROBATCHES, 1 << 30)
        arguments = {"program": print_program(program), "source": emit_python(program)}

        def measure(session: Session) -> list[Sequence[float] | str]:
            found = session.call(
                "time_instructions", [arguments] * count, timeout_seconds=_TIMEOUT_SECONDS
            )
            return [(seconds,) for seconds in found]

        keys = [self._key(Measurement.INSTRUCTION, "", i) for i in range(count)]
        return self._known(keys, [0] * count, measure)

    def _messages(self) -> Rows:
        """Of each device, seconds of work on a message and on a byte of it."""
        count = len(self._cluster.devices)
        keys = [self._key(Measurement.MESSAGE, "", i) for i in range(count)]
        return self._known(
            keys,
            [0] * count,
            lambda session: session.call("time_messages", timeout_seconds=_TIMEOUT_SECONDS),
        )

    def _known(self, keys: Sequence[BlockKey], counts: Sequence[int], measure: _Measure) -> Rows:
        """What the database has of all `keys`, or what is measured now: of equal keys the mean.

        Of each device in turn, seconds of computing, which take longer where workers share cores.
        """
        found = self._look_up(keys)
        if found is None:
            with measuring_turn(self._say):
                found = self._look_up(keys)  # whoever was waited for may have measured the same
                found = found or self._measured(keys, counts, measure)
        shares = itertools.cycle(self._core_shares)
        return [
            tuple(seconds / share for seconds in row)
            for row, share in zip(found, shares, strict=False)
        ]

    def _look_up(self, keys: Sequence[BlockKey]) -> Rows | None:
        known = {key: self._database.get(key) for key in dict.fromkeys(keys)}
        found = [record.seconds for key in keys if (record := known[key]) is not None]
        return found if len(found) == len(keys) else None

    def _measured(self, keys: Sequence[BlockKey], counts: Sequence[int], measure: _Measure) -> Rows:
        try:
            found = measure(self._started())
        except WorkerLost as error:
            self._session = None
            raise NotMeasured(error.cause.partition(";")[0]) from error
        rows: dict[BlockKey, list[Sequence[float]]] = defaultdict(list)
        for rank, (key, row) in enumerate(zip(keys, found, strict=True)):
            if isinstance(row, str):
                raise NotMeasured(f"rank {rank}, {row}")
            rows[key].append(row)
        means = {key: _means(own) for key, own in rows.items()}
        for key, count in dict(zip(keys, counts, strict=True)).items():
            self._database.put(Record(key, "", count, means[key], time.time()))
        return [means[key] for key in keys]

    def _started(self) -> Session:
        if self._session is None:
            self._session = profiling_session(self._cluster, timeout_seconds=_TIMEOUT_SECONDS)
        return self._session

    def _key(self, kind: Measurement, content: str, device: int) -> BlockKey:
        return BlockKey(
            content=hashlib.sha256(content.encode()).hexdigest(),
            mode=self._graph.mode.value,
            device=self._hardware[device],
            copies=1,
            compiled=False,
            cuda_graphs=self._cuda_graphs and kind is Measurement.NODES,
            torch=torch.__version__,
            kind=kind,
        )

    def _by_type(self, rows: Rows) -> dict[str, tuple[float, ...]]:
        """Means over the devices of each type."""
        found: dict[str, list[Sequence[float]]] = {}
        for device, row in zip(self._cluster.devices, rows, strict=True):
            found.setdefault(device.type, []).append(row)
        return {name: _means(own) for name, own in found.items()}


def _together(hardware: Sequence[str], texts: Sequence[str]) -> str:
    """Programs that run at the same time, in whatever order the devices are."""
    return "\n".join(f"{name}\n{text}" for name, text in sorted(zip(hardware, texts, strict=True)))


def _medians(rows: Sequence[Sequence[float] | str]) -> Sequence[float] | str:
    reasons = [row for row in rows if isinstance(row, str)]
    return reasons[0] if reasons else tuple(map(statistics.median, zip(*rows, strict=True)))


def _means(rows: Sequence[Sequence[float]]) -> tuple[float, ...]:
    return tuple(map(statistics.mean, zip(*rows, strict=True)))


def _corrected(
    everywhere: tuple[float, ...], in_place: dict[int, list[float]]
) -> tuple[float, ...]:
    """`everywhere` with the nodes that were measured in place, and their ratio on the others."""
    own = {node: statistics.mean(found) for node, found in in_place.items()}
    before = sum(everywhere[node] for node in own)
    ratio = sum(own.values()) / before if before > 0.0 else 1.0
    return tuple(own.get(node, seconds * ratio) for node, seconds in enumerate(everywhere))
