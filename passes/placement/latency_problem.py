"""Placement for latency as a mathematical problem: timed units, nets and machines.

A *host* is a device of a concurrent kind: what runs there waits for nothing but its inputs. A
*machine* is any other device. A *unit* is an operator, or in a coarse problem a group of operators
that stay together; a *net* is a result with the units that read it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import networkx as nx

from ...compiler.ir.workload import Workload

__all__ = ["LatencyProblem", "Net", "latency_problem", "machine_order"]

_INFINITE = math.inf


@dataclass(frozen=True, slots=True)
class Net:
    """A result: its producer, the units that read it (not the producer), and what a device of each
    kind pays for moving it in or out."""

    producer: int
    readers: tuple[int, ...]
    fees: tuple[float, ...]


@dataclass(frozen=True)
class LatencyProblem:
    """Units and the devices they may run on.

    Args:
        workload: with the devices of each concurrent kind counted as one.
        members: operators of every unit, producers first.
        times: [units][kinds] time of the unit; None: not supported.
        sizes: bytes of every unit.
        nets: results that other units read.
        tied: groups of units that share a device.
    """

    workload: Workload
    members: tuple[tuple[int, ...], ...]
    times: tuple[tuple[float | None, ...], ...]
    sizes: tuple[float, ...]
    nets: tuple[Net, ...]
    tied: tuple[tuple[int, ...], ...]

    @property
    def num_units(self) -> int:
        return len(self.members)

    @cached_property
    def hosts(self) -> tuple[int, ...]:
        """Devices of concurrent kinds."""
        kinds = self.workload.kinds
        return tuple(d for d, k in enumerate(self.workload.kind_of) if kinds[k].concurrent)

    @cached_property
    def machines(self) -> tuple[int, ...]:
        """Devices of other kinds."""
        kinds = self.workload.kinds
        return tuple(d for d, k in enumerate(self.workload.kind_of) if not kinds[k].concurrent)

    @cached_property
    def edges(self) -> tuple[tuple[int, int], ...]:
        """(producer, reader) pairs of units, once each."""
        return tuple(
            dict.fromkeys((net.producer, reader) for net in self.nets for reader in net.readers)
        )

    def expand(self, device_of: Sequence[int]) -> tuple[int, ...]:
        """The device of every operator, from that of every unit."""
        placed = [0] * len(self.workload.operators)
        for members, device in zip(self.members, device_of, strict=True):
            for v in members:
                placed[v] = device
        return tuple(placed)

    def limit(self, kind: int) -> float:
        """Bytes that a device of the kind holds; infinite without limit."""
        memory = self.workload.kinds[kind].memory
        return _INFINITE if memory is None else memory


def latency_problem(
    workload: Workload, groups: Sequence[Sequence[int]] | None = None
) -> LatencyProblem:
    """The problem with every operator as a unit, or every one of `groups`.

    Args:
        groups: operators of every unit, whose graph must have no cycle. Their time on a machine is
            the sum, on a host the longest path, so that a coarse problem's values are estimates.
    """
    members = groups or [(v,) for v in range(len(workload.operators))]
    ordered = _producers_first(workload, members)
    unit_of = {v: unit for unit, group in enumerate(ordered) for v in group}
    return LatencyProblem(
        workload,
        members=ordered,
        times=tuple(_times(workload, group) for group in ordered),
        sizes=tuple(sum(workload.operators[v].size for v in group) for group in ordered),
        nets=_nets(workload, unit_of),
        tied=tuple(
            tied
            for group in workload.colours
            if len(tied := tuple(dict.fromkeys(unit_of[v] for v in group))) > 1
        ),
    )


def _producers_first(
    workload: Workload, groups: Sequence[Sequence[int]]
) -> tuple[tuple[int, ...], ...]:
    rank = {v: number for number, v in enumerate(workload.topological)}
    return tuple(tuple(sorted(group, key=rank.__getitem__)) for group in groups)


def _times(workload: Workload, group: Sequence[int]) -> tuple[float | None, ...]:
    return tuple(
        _host_time(workload, group, k) if kind.concurrent else _machine_time(workload, group, k)
        for k, kind in enumerate(workload.kinds)
    )


def _machine_time(workload: Workload, group: Sequence[int], kind: int) -> float | None:
    total = 0.0
    for v in group:
        time = workload.operators[v].times[kind]
        if time is None:
            return None
        total += time
    return total


def _host_time(workload: Workload, group: Sequence[int], kind: int) -> float | None:
    ready: dict[int, float] = {}
    for v in group:
        time = workload.operators[v].times[kind]
        if time is None:
            return None
        ready[v] = time + max((ready.get(u, 0.0) for u in workload.producers[v]), default=0.0)
    return max(ready.values())


def _nets(workload: Workload, unit_of: dict[int, int]) -> tuple[Net, ...]:
    """Results that leave their unit; those with the same units are one."""
    fees: dict[tuple[int, tuple[int, ...]], tuple[float, ...]] = {}
    for v, operator in enumerate(workload.operators):
        readers = tuple(sorted({unit_of[c] for c in workload.consumers[v]} - {unit_of[v]}))
        if readers:
            key = (unit_of[v], readers)
            known = fees.get(key, (0.0,) * len(workload.kinds))
            fees[key] = tuple(a + b for a, b in zip(known, operator.transfers, strict=True))
    return tuple(Net(producer, readers, fee) for (producer, readers), fee in fees.items())


def machine_order(problem: LatencyProblem, device_of: Sequence[int]) -> list[int] | None:
    """Machines in an order in which their pieces can be run, those without units last; None: they
    wait for each other."""
    hosts = set(problem.hosts)
    graph = nx.DiGraph()
    node = [("unit", v) if d in hosts else ("machine", d) for v, d in enumerate(device_of)]
    graph.add_nodes_from(sorted(node))
    graph.add_edges_from((node[u], node[v]) for u, v in problem.edges if node[u] != node[v])
    if not nx.is_directed_acyclic_graph(graph):
        return None
    used = [d for what, d in nx.lexicographical_topological_sort(graph) if what == "machine"]
    return used + [d for d in problem.machines if d not in set(used)]
