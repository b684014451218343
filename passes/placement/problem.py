"""Placement as a mathematical problem: units on devices of several kinds, and nets between them.

A unit is what must share a device: a colour class and, where pieces must be contiguous, classes
that wait for each other. A net is a result that may cross devices: the units of its producer and
its consumers (its pins), and what each device that holds a pin pays when not all pins are on it.
Whether the producer or a consumer pays makes no difference, so that pins are alike.

Units are numbered by first operator. Kinds without a device are left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import networkx as nx
import numpy as np
import numpy.typing as npt

from ...compiler.ir.workload import Workload

__all__ = ["Floats", "Integers", "PlacementProblem", "merge", "placement_problem"]

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class PlacementProblem:
    """Units, nets and devices; `workload` positions appear in `members` and `devices` only.

    Args:
        devices: numbers of the devices of every kind.
        memory: [kinds] bytes a device holds; inf: without limit.
        times: [units, kinds] time on a device of each kind; inf: not supported.
        sizes: [units] bytes.
        pins: units of every net, ascending, at least two.
        fees: [nets, kinds] what a device pays that holds some pins of a net but not all.
        arcs: (before, after) pairs of units that contiguous pieces have to respect.
        flows: (producer, consumer) pairs of all results, also those that no piece must respect.
        members: operators of every unit, ascending.
    """

    devices: tuple[tuple[int, ...], ...]
    memory: Floats
    times: Floats
    sizes: Floats
    pins: tuple[tuple[int, ...], ...]
    fees: Floats
    arcs: tuple[tuple[int, int], ...]
    flows: tuple[tuple[int, int], ...]
    members: tuple[tuple[int, ...], ...]

    @property
    def num_units(self) -> int:
        return len(self.members)

    @property
    def num_devices(self) -> int:
        return sum(self.counts)

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Number of devices of every kind."""
        return tuple(map(len, self.devices))

    @cached_property
    def slots(self) -> tuple[int, ...]:
        """Kind of every device, kinds in order; solvers number devices like this, from 0."""
        return tuple(kind for kind, group in enumerate(self.devices) for _ in group)

    @cached_property
    def nets_of(self) -> tuple[tuple[int, ...], ...]:
        """Nets that have a pin on every unit."""
        found: list[list[int]] = [[] for _ in self.members]
        for net, pins in enumerate(self.pins):
            for unit in pins:
                found[unit].append(net)
        return tuple(map(tuple, found))

    def placement(self, slot_of: Sequence[int]) -> tuple[int, ...]:
        """Device of every operator, from a slot (see `slots`) of every unit."""
        numbers = [device for group in self.devices for device in group]
        placed = [0] * sum(map(len, self.members))
        for members, slot in zip(self.members, slot_of, strict=True):
            for operator in members:
                placed[operator] = numbers[slot]
        return tuple(placed)


def placement_problem(workload: Workload, *, contiguous: bool) -> PlacementProblem:
    """The problem of a workload, with colour classes merged.

    With `contiguous`, classes on a cycle of forward edges are merged too: devices that they are
    spread over would wait for each other. Uncoloured backward operators stay free.
    """
    problem = merge(_single_operators(workload), workload.colours)
    if not contiguous:
        return problem
    graph = nx.DiGraph(problem.arcs)
    graph.add_nodes_from(range(problem.num_units))
    return merge(problem, nx.strongly_connected_components(graph))


def _single_operators(workload: Workload) -> PlacementProblem:
    """Every operator as a unit."""
    present = [k for k, kind in enumerate(workload.kinds) if kind.count]
    operators = workload.operators
    crossing = [v for v in range(len(operators)) if workload.consumers[v]]
    return PlacementProblem(
        devices=tuple(
            tuple(d for d, kind in enumerate(workload.kind_of) if kind == k) for k in present
        ),
        memory=np.array(
            [np.inf if (m := workload.kinds[k].memory) is None else m for k in present],
            dtype=np.float64,
        ),
        times=np.array(
            [[np.inf if (t := o.times[k]) is None else t for k in present] for o in operators],
            dtype=np.float64,
        ),
        sizes=np.array([o.size for o in operators], dtype=np.float64),
        pins=tuple((v, *workload.consumers[v]) for v in crossing),
        fees=np.array(
            [[operators[v].transfers[k] for k in present] for v in crossing], dtype=np.float64
        ).reshape(len(crossing), len(present)),
        arcs=tuple(
            (u, v)
            for u, v in workload.edges
            if not (operators[u].backward or operators[v].backward)
        ),
        flows=workload.edges,
        members=tuple((v,) for v in range(len(operators))),
    )


def merge(problem: PlacementProblem, groups: Iterable[Iterable[int]]) -> PlacementProblem:
    """The problem whose units are the given groups, which cover all units once.

    Nets inside a group and nets that cost nothing disappear; nets with the same pins become one.
    """
    ordered = sorted(
        sorted(group, key=lambda unit: problem.members[unit][0]) for group in map(list, groups)
    )
    ordered.sort(key=lambda group: problem.members[group[0]][0])
    label = np.empty(problem.num_units, dtype=np.int64)
    for new, group in enumerate(ordered):
        label[group] = new
    count, kinds = len(ordered), len(problem.devices)
    times, sizes = np.zeros((count, kinds)), np.zeros(count)
    np.add.at(times, label, problem.times)
    np.add.at(sizes, label, problem.sizes)
    nets: dict[tuple[int, ...], Floats] = {}
    labels = label.tolist()
    for pins, fee in zip(problem.pins, problem.fees, strict=True):
        new_pins = tuple(sorted({labels[unit] for unit in pins}))
        if len(new_pins) > 1 and fee.any():
            nets[new_pins] = nets[new_pins] + fee if new_pins in nets else fee
    return PlacementProblem(
        devices=problem.devices,
        memory=problem.memory,
        times=times,
        sizes=sizes,
        pins=tuple(nets),
        fees=np.array(list(nets.values()), dtype=np.float64).reshape(len(nets), kinds),
        arcs=_between(problem.arcs, labels),
        flows=_between(problem.flows, labels),
        members=tuple(
            tuple(sorted(m for unit in group for m in problem.members[unit])) for group in ordered
        ),
    )


def _between(pairs: Iterable[tuple[int, int]], labels: list[int]) -> tuple[tuple[int, int], ...]:
    """Pairs of different labels, once each, ascending."""
    return tuple(sorted({(a, b) for u, v in pairs if (a := labels[u]) != (b := labels[v])}))
