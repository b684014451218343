"""Measure the operators of a captured graph, and messages, on the devices that are to run it.

One worker for each device, all at the same time, as they will run. First every node is measured on
every type of device, then, where operators have been placed, those of each device once more in
place: no other nodes run beside them, so that caches and memory are shared as in the stream. Times
are kept in the user's cache (`profile_database.py`); where devices are of one type the mean of
their figures counts.
"""

from __future__ import annotations

import hashlib
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
from .profile_database import BlockKey, Measurement, ProfileDatabase, Record
from .ranks import check_measurable, profiling_session
from .turns import measuring_turn

__all__ = ["NodeTimes", "NotMeasured"]

_LEAST_SECONDS = 2.0  # for which every worker measures
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

    Raises:
        UsageError: the devices are not those of this machine.
    """

    def __init__(
        self,
        captured: Captured,
        cluster: Cluster,
        database: ProfileDatabase,
        say: Callable[[str], None],
    ) -> None:
        check_measurable(cluster)
        self._graph = captured.graph
        self._cluster = cluster
        self._database = database
        self._say = say
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
            nodes = self._timed([self._whole] * len(self._cluster.devices))
            links = {
                name: Link(latency, 1.0 / per_byte if per_byte > 0 else math.inf)
                for name, (latency, per_byte) in self._by_type(self._messages()).items()
            }
            self._everywhere = Measured(self._by_type(nodes), links)
        return self._everywhere

    def in_place(self, plan: Plan) -> Measured:
        """The same, with what the nodes that `plan` has placed take where they are.

        On a type of device, nodes that are on none of its devices take as much more or less than
        measured everywhere as those take together that are.

        Raises:
            NotMeasured: the memory of a device does not suffice.
            RuntimeFailure: a worker failed.
        """
        before = self.everywhere()
        programs = [self._own(plan, device.index) for device in self._cluster.devices]
        found: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
        for device, program, row in zip(
            self._cluster.devices, programs, self._timed(programs), strict=True
        ):
            for stage, seconds in zip(program.stages, row, strict=True):
                found[device.type][stage.index].append(seconds)
        return replace(
            before,
            nodes={name: _corrected(row, found[name]) for name, row in before.nodes.items()},
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

    def _timed(self, programs: Sequence[Program]) -> Rows:
        """Seconds of the nodes of each program on its device, all at the same time."""
        texts = [print_program(program) for program in programs]
        kinds = sorted(zip(self._hardware, texts, strict=True))
        together = "\n".join(f"{name}\n{text}" for name, text in kinds)
        keys = [
            self._key(Measurement.NODES, f"{text}\n{together}", i) for i, text in enumerate(texts)
        ]
        counts = [len(program.stages) for program in programs]

        def measure(session: Session) -> list[Sequence[float] | str]:
            arguments = [
                {"program": text, "source": emit_python(program), "seconds": _LEAST_SECONDS}
                for text, program in zip(texts, programs, strict=True)
            ]
            return session.call("time_nodes", arguments, timeout_seconds=_TIMEOUT_SECONDS)

        return self._known(keys, counts, measure)

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
        """What the database has of all `keys`, or what is measured now: of equal keys the mean."""
        found = self._look_up(keys)
        if found is not None:
            return found
        with measuring_turn(self._say):
            found = self._look_up(keys)  # whoever was waited for may have measured the same
            return found or self._measured(keys, counts, measure)

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
            cuda_graphs=False,
            torch=torch.__version__,
            kind=kind,
        )

    def _by_type(self, rows: Rows) -> dict[str, tuple[float, ...]]:
        """Means over the devices of each type."""
        found: dict[str, list[Sequence[float]]] = {}
        for device, row in zip(self._cluster.devices, rows, strict=True):
            found.setdefault(device.type, []).append(row)
        return {name: _means(own) for name, own in found.items()}


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
