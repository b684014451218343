"""What a placement of operators costs: the objectives of operator placement, in floating point.

Every value that a solver reports is computed here, on the original graph, whatever scaled integers
or merged operators the solver worked with. Semantics as in Tarnawski et al. (NeurIPS 2020).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import networkx as nx

from ..compiler.ir.workload import Placement, Workload

__all__ = [
    "Load",
    "contiguity_breaks",
    "device_loads",
    "latency",
    "memory_used",
    "piece_latency",
    "violations",
]

_TOLERANCE = 1e-9  # relative; sums of sizes in another order


@dataclass(frozen=True, slots=True)
class Load:
    """Time that one device is busy for one sample: computing, and moving results in and out."""

    compute: float
    communication: float

    @property
    def total(self) -> float:
        return self.compute + self.communication


def device_loads(workload: Workload, placement: Placement) -> tuple[Load, ...]:
    """Load of every device; the throughput objective is the largest total.

    A result that crosses devices is paid once on its producer's device and once on each other
    device with a consumer, however many consumers there are, at the transfer time of the device's
    kind. Communication is added to computation, not overlapped.
    """
    compute = [0.0] * workload.num_devices
    communication = [0.0] * workload.num_devices
    kind_of = workload.kind_of
    for v, operator in enumerate(workload.operators):
        here = placement[v]
        compute[here] += operator.times[kind_of[here]] or 0.0
        others = {placement[c] for c in workload.consumers[v]} - {here}
        for device in sorted(others | {here}) if others else ():
            communication[device] += operator.transfers[kind_of[device]]
    return tuple(Load(*pair) for pair in zip(compute, communication, strict=True))


def memory_used(workload: Workload, placement: Placement) -> tuple[float, ...]:
    """Bytes that the operators on every device hold."""
    used = [0.0] * workload.num_devices
    for operator, device in zip(workload.operators, placement, strict=True):
        used[device] += operator.size
    return tuple(used)


def violations(workload: Workload, placement: Placement) -> tuple[str, ...]:
    """Constraints that hold in both objectives and are broken here, one sentence each."""
    broken = []
    colours: dict[str, set[int]] = defaultdict(set)
    for operator, device in zip(workload.operators, placement, strict=True):
        if not 0 <= device < workload.num_devices:
            return (f"operator {operator.name!r} is on device {device}, which does not exist",)
        kind = workload.kind_of[device]
        if operator.times[kind] is None:
            broken.append(f"device {device} does not support operator {operator.name!r}")
        if operator.colour is not None:
            colours[operator.colour].add(device)
    for colour, devices in colours.items():
        if len(devices) > 1:
            broken.append(f"colour {colour} is split over devices {sorted(devices)}")
    for device, used in enumerate(memory_used(workload, placement)):
        limit = workload.kinds[workload.kind_of[device]].memory
        if limit is not None and used > limit * (1 + _TOLERANCE):
            broken.append(f"device {device} holds {used:.0f} of {limit:.0f} bytes")
    return tuple(broken)


def contiguity_breaks(workload: Workload, placement: Placement) -> tuple[str, ...]:
    """Why a placement is not contiguous; empty: it is.

    Contiguous: the devices, connected by the forward edges that cross them, form an acyclic graph,
    so that they can be passed through as the stages of a pipeline. This implies that no path of
    forward operators leaves a device and enters it again.
    """
    graph = nx.DiGraph()
    for u, v in workload.edges:
        if workload.operators[u].backward or workload.operators[v].backward:
            continue
        if placement[u] != placement[v]:
            graph.add_edge(placement[u], placement[v])
    if nx.is_directed_acyclic_graph(graph):
        return ()
    cycle = [a for a, *_ in nx.find_cycle(graph)]
    return ("devices wait for each other: " + " -> ".join(map(str, [*cycle, cycle[0]])),)


def latency(workload: Workload, placement: Placement) -> float | None:
    """Time until the last result of one sample is ready, with one piece a device; None: the pieces
    wait for each other, so no order of them exists.

    An operator on a concurrent kind starts when its producers' results are ready. Any other device
    runs all its operators as one piece: it starts when the results of all producers outside are
    ready, and takes the sum of moving those in (each once), computing, and moving out every result
    that has a consumer outside; all its results are ready when it finishes.
    """
    concurrent = [workload.kinds[k].concurrent for k in workload.kind_of]
    unit = [
        ("operator", v) if concurrent[device] else ("device", device)
        for v, device in enumerate(placement)
    ]
    busy: dict[tuple[str, int], float] = defaultdict(float)
    moved: set[tuple[int, int]] = set()
    graph = nx.DiGraph()
    graph.add_nodes_from(unit)
    for v, operator in enumerate(workload.operators):
        busy[unit[v]] += operator.times[workload.kind_of[placement[v]]] or 0.0
    for u, v in workload.edges:
        if unit[u] != unit[v]:
            graph.add_edge(unit[u], unit[v])
            moved |= {(end, u) for end in (u, v) if not concurrent[placement[end]]}
    if not nx.is_directed_acyclic_graph(graph):
        return None
    for where, u in {(unit[end], u) for end, u in moved}:
        device = where[1]
        busy[where] += workload.operators[u].transfers[workload.kind_of[device]]
    ready: dict[tuple[str, int], float] = {}
    for one in nx.topological_sort(graph):
        ready[one] = busy[one] + max((ready[p] for p in graph.predecessors(one)), default=0.0)
    return max(ready.values())


def piece_latency(
    workload: Workload, placement: Placement, pieces: Sequence[Sequence[int]]
) -> float | None:
    """Time until the last result of one sample is ready, where a device may run several pieces;
    None: the pieces wait for each other.

    Every operator on a device that is not concurrent is in one piece; the pieces of a device run
    one after another, in their order in `pieces`, and never overlap. A piece starts when its device
    has finished the piece before, and the results of all producers outside the device and in its
    earlier pieces are ready. It takes the sum of moving in each result of another device that no
    earlier piece of the device has moved in, computing, and moving out every own result with a
    consumer on another device; all its results are ready when it finishes. So a result is moved in
    and out once a device, and what stays on its device is free. An operator on a concurrent kind
    starts when its producers' results are ready. With one piece a device this is `latency`.

    Raises:
        ValueError: the pieces are not those of the placement.
    """
    piece_of = _piece_of(workload, placement, pieces)
    last = len(pieces)  # units from here on: operators on concurrent kinds
    unit = [last + v if piece is None else piece for v, piece in enumerate(piece_of)]
    busy: dict[int, float] = defaultdict(float)
    graph = nx.DiGraph()
    graph.add_nodes_from(unit)
    graph.add_edges_from((unit[u], unit[v]) for u, v in workload.edges if unit[u] != unit[v])
    before: dict[int, int] = {}
    for number, piece in enumerate(pieces):
        device = placement[piece[0]]
        if device in before:
            graph.add_edge(before[device], number)
        before[device] = number
    if not nx.is_directed_acyclic_graph(graph):
        return None
    for v, operator in enumerate(workload.operators):
        kind = workload.kind_of[placement[v]]
        busy[unit[v]] += operator.times[kind] or 0.0
        readers: dict[int, int] = {}
        for c in workload.consumers[v]:
            if placement[c] != placement[v]:
                readers[placement[c]] = min(readers.get(placement[c], unit[c]), unit[c])
        if readers and piece_of[v] is not None:
            busy[unit[v]] += operator.transfers[kind]
        for device, first in readers.items():
            if first < last:
                busy[first] += operator.transfers[workload.kind_of[device]]
    ready: dict[int, float] = {}
    for one in nx.topological_sort(graph):
        ready[one] = busy[one] + max((ready[p] for p in graph.predecessors(one)), default=0.0)
    return max(ready.values())


def _piece_of(
    workload: Workload, placement: Placement, pieces: Sequence[Sequence[int]]
) -> list[int | None]:
    """Number of every operator's piece; None: it runs on a concurrent kind."""
    found: list[int | None] = [None] * len(workload.operators)
    for number, piece in enumerate(pieces):
        for v in piece:
            if found[v] is not None or placement[v] != placement[piece[0]]:
                raise ValueError(f"operator {v} is in two pieces, or on another device than its")
            found[v] = number
    for v, device in enumerate(placement):
        if workload.kinds[workload.kind_of[device]].concurrent == (found[v] is not None):
            raise ValueError(f"operator {v} is in no piece, or in one of a concurrent kind")
    return found
