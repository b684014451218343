"""A cost-annotated operator graph and the devices it may be placed on.

This is the input of operator placement: no tensors, only times, sizes and dependencies, as in
Tarnawski et al., "Efficient Algorithms for Device Placement of DNN Graph Operators" (NeurIPS 2020),
generalised from accelerators and CPUs to any number of kinds of device. Times are in the unit of
the workload (the public ones use milliseconds), sizes in bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import isfinite
from typing import NoReturn

import networkx as nx

from .errors import UsageError

__all__ = ["DeviceKind", "Operator", "Placement", "Workload"]

Placement = Sequence[int]
"""The device of every operator, by the operator's position in `Workload.operators`."""


@dataclass(frozen=True, slots=True)
class DeviceKind:
    """Devices that are alike.

    Args:
        name: unique in the workload (`accelerator`, `cpu`).
        count: how many there are.
        memory: bytes that the operators on one device may hold; None: without limit.
        concurrent: in the latency objective, its operators never wait for each other (a host with
            cores to spare); False: one at a time.
    """

    name: str
    count: int
    memory: float | None = None
    concurrent: bool = False


@dataclass(frozen=True, slots=True)
class Operator:
    """One node of the graph.

    Args:
        name: unique; what placements in files are keyed by.
        times: seconds (or the workload's unit) that it takes on a device of each kind, in the order
            of `Workload.kinds`; None: that kind does not support it.
        transfers: time that a device of each kind spends on moving this operator's result in or
            out, once a device however many consumers there are; 0: that kind pays nothing.
        size: bytes that it holds on its device.
        colour: operators of one colour share a device; None: free.
        backward: it belongs to the backward pass, which contiguity ignores (backward operators
            follow their forward ones by colour).
    """

    name: str
    times: tuple[float | None, ...]
    transfers: tuple[float, ...]
    size: float = 0.0
    colour: str | None = None
    backward: bool = False


@dataclass(frozen=True)
class Workload:
    """A directed acyclic graph of operators, and devices.

    Devices are numbered through the kinds in their order: the first `kinds[0].count` are of kind 0.

    Args:
        kinds: kinds of device.
        operators: nodes; an edge names its ends by position here.
        edges: (producer, consumer) pairs, without repetition.

    Raises:
        UsageError: the graph has a cycle, a name twice, a negative or missing figure, an operator
            that no present device supports, or an edge to nowhere.
    """

    kinds: tuple[DeviceKind, ...]
    operators: tuple[Operator, ...]
    edges: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        self._check_kinds()
        self._check_operators()
        self._check_edges()

    @cached_property
    def kind_of(self) -> tuple[int, ...]:
        """Kind of every device, by device number."""
        return tuple(k for k, kind in enumerate(self.kinds) for _ in range(kind.count))

    @property
    def num_devices(self) -> int:
        return len(self.kind_of)

    @cached_property
    def consumers(self) -> tuple[tuple[int, ...], ...]:
        """Consumers of every operator, ascending."""
        return _neighbours(len(self.operators), self.edges)

    @cached_property
    def producers(self) -> tuple[tuple[int, ...], ...]:
        """Producers that every operator reads, ascending."""
        return _neighbours(len(self.operators), ((v, u) for u, v in self.edges))

    @cached_property
    def topological(self) -> tuple[int, ...]:
        """Positions of the operators, producers first; ties by position."""
        graph = nx.DiGraph()
        graph.add_nodes_from(range(len(self.operators)))
        graph.add_edges_from(self.edges)
        return tuple(nx.lexicographical_topological_sort(graph))

    @cached_property
    def colours(self) -> tuple[tuple[int, ...], ...]:
        """Operators that share a device, as groups; those without colour are alone."""
        groups: dict[object, list[int]] = {}
        for v, operator in enumerate(self.operators):
            groups.setdefault(v if operator.colour is None else operator.colour, []).append(v)
        return tuple(tuple(group) for group in groups.values())

    def _check_kinds(self) -> None:
        if not self.kinds or sum(kind.count for kind in self.kinds) == 0:
            _refuse("there is no device to place operators on", "devices")
        for name, times in Counter(kind.name for kind in self.kinds).items():
            if times > 1:
                _refuse(f"two kinds of device are called {name!r}", "devices")
        for kind in self.kinds:
            if kind.count < 0:
                _refuse(f"the number of devices is {kind.count}", f"device kind {kind.name!r}")
            if kind.memory is not None and not (isfinite(kind.memory) and kind.memory >= 0):
                _refuse(f"the memory is {kind.memory} bytes", f"device kind {kind.name!r}")

    def _check_operators(self) -> None:
        if not self.operators:
            _refuse("the workload has no operator", "nodes")
        for name, times in Counter(operator.name for operator in self.operators).items():
            if times > 1:
                _refuse(f"{times} operators are called {name!r}", "nodes")
        for operator in self.operators:
            self._check_operator(operator)

    def _check_operator(self, operator: Operator) -> None:
        where = f"operator {operator.name!r}"
        if len(operator.times) != len(self.kinds) or len(operator.transfers) != len(self.kinds):
            _refuse(
                f"it needs one time and one transfer for each of {len(self.kinds)} kinds", where
            )
        figures = [t for t in operator.times if t is not None]
        for what, value in [
            *(("time", t) for t in figures),
            *(("transfer time", t) for t in operator.transfers),
            ("size", operator.size),
        ]:
            if not (isfinite(value) and value >= 0):
                _refuse(f"its {what} is {value}; it must be finite and at least 0", where)
        if not any(
            time is not None and kind.count
            for time, kind in zip(operator.times, self.kinds, strict=True)
        ):
            _refuse("no device supports it", where)

    def _check_edges(self) -> None:
        last = len(self.operators)
        for edge in self.edges:
            if not all(0 <= end < last for end in edge):
                _refuse(f"edge {edge} names an operator that does not exist", "edges")
        if len(set(self.edges)) < len(self.edges):
            _refuse("an edge is given twice", "edges")
        graph = nx.DiGraph(self.edges)
        if not nx.is_directed_acyclic_graph(graph):
            names = [self.operators[u].name for u, *_ in nx.find_cycle(graph)]
            _refuse("the graph has a cycle: " + " -> ".join([*names, names[0]]), "edges")


def _neighbours(count: int, edges: Iterable[tuple[int, int]]) -> tuple[tuple[int, ...], ...]:
    found: list[list[int]] = [[] for _ in range(count)]
    for u, v in edges:
        found[u].append(v)
    return tuple(tuple(sorted(one)) for one in found)


def _refuse(cause: str, where: str) -> NoReturn:
    raise UsageError(cause, where=where, ways_out=("correct the workload",))
