"""Times of the parts of local graphs: read from the database or measured, and as corrections.

Each distinct part (`profile_parts.py`) that takes more than next to nothing is measured once, on a
worker of every device of the cluster at the same time, as they will run; where devices are of one
type the mean counts. The operators of a part share the factor between what it took and what it is
predicted to take by the rates, other ranks apart; an operator in several parts has their mean.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from ..cost_models.analysis import weight_like_values
from ..cost_models.collectives import Network
from ..cost_models.corrections import Share, fit_corrections, signature_of
from ..cost_models.ops import NodeCost, price_once
from ..cost_models.stages import in_weights
from ..runtime.session import LocalSession
from .codegen.python import emit_python
from .hardware import hardware_of
from .ir.cluster import Cluster
from .ir.errors import WorkerLost
from .ir.graph import Graph, Node
from .ir.mesh import Mesh
from .ir.ops import Category
from .ir.plan import ProfiledBlock
from .ir.program import Program
from .ir.text import print_program
from .profile_database import BlockKey, ProfileDatabase, Record
from .profile_parts import Part, parts_of
from .ranks import check_measurable, profiling_session
from .turns import measuring_turn
from .words import plural, seconds_text

__all__ = [
    "BlockTimes",
    "BlockWorkers",
    "Measurer",
    "Phases",
    "ProfileOptions",
    "Row",
    "Runs",
    "cost_alone",
    "slowest_phases",
]

_TIMEOUT_SECONDS = 300.0
_LOCAL = ("shard", "as_partial")  # collectives that look at the rank's own tensor alone
_LEAST_SHARE = 1e-3  # of the graph's time, for a part to be measured
_MOST_COPIES = 16
# of all copies: more than one worker has of the caches
_WORKING_SET_BYTES, _ON_CUDA_BYTES = 32 << 20, 128 << 20
_WINDOW_SECONDS = 0.03  # of computing, as between two meetings of ranks
Phases = tuple[float, float, float]
Runs = list[Phases]
Row = Phases | str  # what one device took, or why it could not run the part


@dataclass(frozen=True, slots=True)
class ProfileOptions:
    """What is measured, and how it will run.

    Args:
        kind: `blocks` or `ops`.
        seconds: of measuring, at most.
        compile, cuda_graphs: as for `auto_partition`.
    """

    kind: str
    seconds: float = 60.0
    compile: bool = False
    cuda_graphs: bool = True


class Measurer(Protocol):
    """Runs parts; see `BlockWorkers`."""

    def turn(self, say: Callable[[str], None]) -> AbstractContextManager[None]:
        """What to measure in: nobody else does on these devices, or `say` was told."""
        ...

    def measure(self, part: Part) -> list[Row]:
        """Seconds of forward, input gradients and weight gradients on every device, or why its
        memory does not suffice."""
        ...

    def close(self) -> None:
        """End what was started."""
        ...


class BlockWorkers:
    """Workers on all devices of a local cluster, started when there is something to measure.

    Ranks of a step wait for whichever is the slowest at the time, and on CPUs speeds come and go:
    of devices of one type with cores of their own, that one counts, in every window as long as an
    action. Those that share cores leave theirs to others when they are done: each counts alone.
    """

    def __init__(self, cluster: Cluster, options: ProfileOptions) -> None:
        check_measurable(cluster)
        self._cluster = cluster
        self._options = options
        self._session: LocalSession | None = None

    def turn(self, say: Callable[[str], None]) -> AbstractContextManager[None]:
        return measuring_turn(say)

    def measure(self, part: Part) -> list[Row]:
        """Raises RuntimeFailure: a worker failed. One that was lost, as for want of memory, is
        started anew for the next part."""
        program = Program.unscheduled(part.stage.graph.mode, (part.stage,))
        if self._session is None:
            self._session = profiling_session(self._cluster, timeout_seconds=_TIMEOUT_SECONDS)
        text, source = print_program(program), emit_python(program)
        arguments = [
            {
                "program": text,
                "source": source,
                "copies": copies_of(part, self._cluster.type_of(device.index).backend),
                "compile": self._options.compile,
                "cuda_graphs": self._options.cuda_graphs,
            }
            for device in self._cluster.devices
        ]
        try:
            found = self._session.call("block_runs", arguments, timeout_seconds=_TIMEOUT_SECONDS)
        except WorkerLost as error:
            self._session = None
            return [error.cause.partition(";")[0]] * len(arguments)
        return [self._row(found, device.index) for device in self._cluster.devices]

    def _row(self, found: Sequence[Runs | str], index: int) -> Row:
        """Of what the devices have told, the row of the one at `index`."""
        runs, kind = found[index], self._cluster.type_of(index)
        if isinstance(runs, str):
            return runs
        if kind.backend != "cpu":
            first, second, third = map(statistics.median, zip(*runs, strict=True))
            return first, second, third
        alike = [
            own
            for own, device in zip(found, self._cluster.devices, strict=True)
            if device.type == kind.name and not isinstance(own, str)
        ]
        return slowest_phases([runs] if self._cluster.core_share(index) < 1.0 else alike)

    def close(self) -> None:
        if self._session is not None:
            self._session.close()


def copies_of(part: Part, backend: str) -> int:
    """Sets of tensors that a part is measured on: so many that backward does not find in caches
    what forward has left, nor a microbatch the weights that the one before has used."""
    size = sum(value.type.num_bytes for value in part.stage.graph.values)
    wanted = _ON_CUDA_BYTES if backend == "cuda" else _WORKING_SET_BYTES
    return max(1, min(_MOST_COPIES, -(-wanted // max(1, size))))


def slowest_phases(devices: Sequence[Runs]) -> Phases:
    """Mean seconds of the phases on whichever of the devices, which ran at the same time, was the
    slowest in each window of `_WINDOW_SECONDS`.

    >>> slowest_phases([[(0.1, 0.2, 0.0), (0.3, 0.2, 0.0)], [(0.2, 0.1, 0.0), (0.2, 0.2, 0.0)]])
    (0.25, 0.2, 0.0)
    """
    count = min(map(len, devices))
    whole = max(sum(map(sum, runs[:count])) for runs in devices)
    size = min(count, max(1, math.ceil(_WINDOW_SECONDS * count / whole))) if whole else count
    windows = [range(start, min(start + size, count)) for start in range(0, count, size)]

    def mean(phase: int) -> float:
        """Of one phase, each window by the number of its runs."""
        return (
            sum(max(sum(runs[i][phase] for i in window) for runs in devices) for window in windows)
            / count
        )

    return mean(0), mean(1), mean(2)


class BlockTimes:
    """What is known of a cluster's devices; grows as graphs are looked at.

    Args:
        cluster: whose corrections, if it has some, do not count.
        database: where times are looked up and kept.
        measurer: of what is not known.
        say: receives progress.
        clock: of the budget.
    """

    def __init__(
        self,
        cluster: Cluster,
        options: ProfileOptions,
        database: ProfileDatabase,
        measurer: Measurer,
        say: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        types = tuple(replace(entry, corrections=None) for entry in cluster.types)
        self._cluster = replace(cluster, types=types)
        self._options = options
        self._database = database
        self._measurer = measurer
        self._say = say
        self._clock = clock
        self._types = {device.type: device.index for device in reversed(cluster.devices)}
        self._hardware = {name: hardware_of(cluster, i) for name, i in self._types.items()}
        self._core_share = {name: cluster.core_share(i) for name, i in self._types.items()}
        self._seconds: dict[tuple[str, str], Phases] = {}  # by digest and type
        self._shares: dict[tuple[str, str], tuple[Share, ...]] = {}
        self._failed: set[tuple[str, str]] = set()  # what could not be measured
        self.warnings: list[str] = []
        self.spent_seconds = 0.0
        self.num_measured = 0
        self.num_known = 0

    @property
    def cluster(self) -> Cluster:
        """The cluster without corrections."""
        return self._cluster

    @property
    def kind(self) -> str:
        """What is measured: `blocks` or `ops`."""
        return self._options.kind

    @property
    def num_parts(self) -> int:
        """Parts whose times are known."""
        return len({digest for digest, _ in self._seconds})

    @property
    def is_spent(self) -> bool:
        """Whether the budget is."""
        return self.spent_seconds >= self._options.seconds

    def learn(self, graph: Graph, mesh: Mesh, network: Network | None) -> bool:
        """Get the times of the parts of `graph` that count, the longest first; False if the budget
        ended before. What cannot be measured is warned of and keeps its price.

        Args:
            mesh: the axes of its collectives.
            network: who meets there.
        """
        parts = self._parts(graph, mesh, network)
        missing = [part for part in parts if not self._look_up(part)]
        if missing and not self.is_spent:
            with self._measurer.turn(self._say):
                # whoever was waited for may have measured the same
                self._measure_all([part for part in missing if not self._look_up(part)], len(parts))
        self._share(graph, network, parts)
        return all(self._is_settled(part, name) for part in parts for name in self._types)

    def _measure_all(self, missing: list[Part], count: int) -> None:
        """Measure of `count` parts those that are `missing`, within the budget."""
        if missing:
            self._say(
                f"measure {plural(len(missing), self._noun, 's')} of {count} on "
                f"{plural(len(self._cluster.devices), 'worker', 's')}"
            )
        for number, part in enumerate(missing, 1):
            if self.is_spent:
                break
            self._measure(part, f"{number} of {len(missing)}")

    def _is_settled(self, part: Part, name: str) -> bool:
        """Whether the times of `part` on type `name` are known, or cannot be."""
        return (part.digest, name) in self._seconds or (part.digest, name) in self._failed

    def _parts(self, graph: Graph, mesh: Mesh, network: Network | None) -> tuple[Part, ...]:
        """The parts of `graph`, by what they are predicted to take on any type of device, without
        those that take next to nothing."""
        shares: dict[str, float] = {}  # of the graph's time
        parts = parts_of(graph, mesh, self._options.kind)
        for index in self._types.values():
            costs = price_once(graph, self._cluster.type_of(index), network=network)
            own = {part.digest: part.count * sum(_phases(part, costs)) for part in parts}
            whole = sum(own.values())
            for digest, amount in own.items():
                share = amount / whole if whole else 0.0
                shares[digest] = max(shares.get(digest, 0.0), share)
        kept = [part for part in parts if shares[part.digest] >= _LEAST_SHARE]
        return tuple(sorted(kept, key=lambda part: -shares[part.digest]))

    @property
    def _noun(self) -> str:
        return "block" if self._options.kind == "blocks" else "operator"

    def _key(self, part: Part, name: str) -> BlockKey:
        backend = self._cluster.type_of(self._types[name]).backend
        return BlockKey(
            content=part.digest,
            mode=part.stage.graph.mode.value,
            device=self._hardware[name],
            copies=copies_of(part, backend),
            compiled=self._options.compile,
            cuda_graphs=self._options.cuda_graphs and backend == "cuda",
            torch=torch.__version__,
        )

    def _look_up(self, part: Part) -> bool:
        if all(self._is_settled(part, name) for name in self._types):
            return True
        found = {name: self._database.get(self._key(part, name)) for name in self._types}
        if not all(found.values()):
            return False
        for name, record in found.items():
            assert record is not None
            self._know(part, name, record.seconds)
        self.num_known += 1
        return True

    def _measure(self, part: Part, progress: str) -> None:
        began = self._clock()
        rows = self._measurer.measure(part)
        self.spent_seconds += self._clock() - began
        for name in self._types:
            own = [
                row
                for device, row in zip(self._cluster.devices, rows, strict=True)
                if device.type == name
            ]
            reasons = [row for row in own if isinstance(row, str)]
            if reasons:
                self._give_up(part, name, reasons[0])
                continue
            seconds = tuple(sum(column) / len(own) for column in zip(*own, strict=True))
            self._know(part, name, seconds)
            self._say(f"{self._noun} {progress}, {_told(part)}: {_listed(seconds)} on {name}")
            count = len(part.stage.graph.nodes)
            key = self._key(part, name)
            self._database.put(Record(key, part.path, count, seconds, time.time()))
        self.num_measured += any((part.digest, name) in self._seconds for name in self._types)

    def _know(self, part: Part, name: str, busy: Sequence[float]) -> None:
        """Of `part` on type `name`, `busy` seconds of F, B and W, which take longer where workers
        share cores."""
        first, second, third = (seconds / self._core_share[name] for seconds in busy)
        self._seconds[part.digest, name] = first, second, third

    def _give_up(self, part: Part, name: str, reason: str) -> None:
        self._failed.add((part.digest, name))
        told = (
            f"{self._noun} {_told(part)} could not be measured on {name}, its time is a predicted "
            f"one: {reason}"
        )
        if told not in self.warnings:  # of other sizes of the same
            self.warnings.append(told)
        self._say(told)

    # -- corrections -------------------------------------------------------------------------------

    def corrected(self) -> Cluster:
        """The cluster with all that is known."""
        types = []
        for entry in self._cluster.types:
            shares = (
                s for (_, name), own in self._shares.items() if name == entry.name for s in own
            )
            types.append(replace(entry, corrections=fit_corrections(shares)))
        return replace(self._cluster, types=tuple(types))

    def _share(self, graph: Graph, network: Network | None, parts: tuple[Part, ...]) -> None:
        for name, index in self._types.items():
            costs = price_once(graph, self._cluster.type_of(index), network=network)
            for part in parts:
                key = part.digest, name
                if key in self._seconds and key not in self._shares:
                    self._shares[key] = _shares(graph, part, costs, self._seconds[key])

    def blocks(
        self, graph: Graph, mesh: Mesh, network: Network | None
    ) -> tuple[ProfiledBlock, ...]:
        """The parts of `graph` whose times are known, on every type of device."""
        table = []
        for name, index in sorted(self._types.items()):
            costs = price_once(graph, self._cluster.type_of(index), network=network)
            for part in self._parts(graph, mesh, network):
                if (part.digest, name) not in self._seconds:
                    continue
                table.append(
                    ProfiledBlock(
                        path=part.path,
                        device_type=name,
                        num_nodes=len(part.nodes),
                        count=part.count,
                        predicted=_phases(part, costs),
                        measured=self._seconds[part.digest, name],
                    )
                )
        return tuple(table)

    def close(self) -> None:
        """End the workers."""
        self._measurer.close()


def cost_alone(node: Node, cost: NodeCost) -> NodeCost:
    """What of the `cost` of `node` a rank has without the others: of collectives, the copy of the
    own part."""
    if node.op.category is not Category.COLLECTIVE:
        return cost
    return NodeCost(cost.forward_seconds if node.op.packet in _LOCAL else 0.0, 0.0, 0.0)


def _predicted(part: Part, costs: Sequence[NodeCost]) -> tuple[list[NodeCost], list[float]]:
    """Of each node of `part`: the price without other ranks, and how much of its backward the stage
    computes with weight gradients."""
    own = [
        cost_alone(node, costs[number])
        for node, number in zip(part.stage.graph.nodes, part.nodes, strict=True)
    ]
    return own, in_weights(part.stage.graph, own)


def _phases(part: Part, costs: Sequence[NodeCost]) -> Phases:
    """Seconds of the whole part."""
    own, late = _predicted(part, costs)
    second = sum(cost.backward_seconds for cost in own) - sum(late)
    return sum(cost.forward_seconds for cost in own), max(0.0, second), sum(late)


def _shares(
    graph: Graph, part: Part, costs: Sequence[NodeCost], measured: Phases
) -> tuple[Share, ...]:
    """What each operator of `part` has of the times that were measured."""
    weights = weight_like_values(graph)
    forward, inputs, late = (
        seconds / predicted if seconds > 0.0 and predicted > 0.0 else None
        for seconds, predicted in zip(measured, _phases(part, costs), strict=True)
    )
    table = []
    for number, cost, in_last in zip(part.nodes, *_predicted(part, costs), strict=True):
        if graph.nodes[number].op.category is Category.COLLECTIVE:
            continue  # theirs are the links' times
        is_late = in_last == cost.backward_seconds
        table.append(
            Share(
                signature=signature_of(graph, graph.nodes[number], weights=weights),
                predicted=(
                    cost.forward_seconds,
                    cost.backward_input_seconds,
                    cost.backward_weight_seconds,
                ),
                ratios=(forward, late if is_late else inputs, late),
                weight=part.count,
            )
        )
    return tuple(table)


def _told(part: Part) -> str:
    only = part.stage.graph.nodes[0].op.name if len(part.nodes) == 1 else ""
    return " ".join(filter(None, [only, part.path])) or "operators of no module"


def _listed(seconds: Iterable[float]) -> str:
    return " + ".join(map(seconds_text, seconds))
