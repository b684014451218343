"""The stage problem: what a pipeline partition is decided from, and what a decision is.

Units (fused groups of nodes) form a DAG. A partition gives every unit a stage, monotone along the
DAG, and every stage its own device. All figures are those of one microbatch, except the static
bytes and the optimizer's seconds. Replicated nodes and parameters that several units use are
`Shared`: their bytes and seconds count once in every stage that has a user of them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from ...compiler.ir.cluster import Link
from ...cost_models.overlap import Overlap

__all__ = [
    "Assignment",
    "DeviceClass",
    "Flow",
    "Shared",
    "StageProblem",
    "Unit",
    "in_flight_microbatches",
    "topological_order",
]


@dataclass(frozen=True, slots=True)
class Unit:
    """A group of nodes that stays together.

    Args:
        name: for dumps and messages (`model.layers.3.mlp`).
        forward_seconds, backward_seconds: by device type (position `DeviceClass.type`).
        static_bytes: what it holds throughout: parameters used by this unit alone, their
            gradients and optimizer states.
        saved_bytes: what its backward keeps of each microbatch in flight.
        transient_bytes: live peak while it runs.
        update_bytes, update_peak_bytes: temporaries of the optimizer's step, when no activation
            is left: those that add up over a stage, and those that do not.
        optimizer_seconds: of updating those parameters, by device type.
        weight_seconds: of `backward_seconds`, those of weight gradients.
        sum_seconds: of summing the gradients of those parameters over ranks, once a step.
        early_seconds: of summing gradients over ranks once a microbatch.
    """

    name: str
    forward_seconds: tuple[float, ...]
    backward_seconds: tuple[float, ...]
    static_bytes: int = 0
    saved_bytes: int = 0
    transient_bytes: int = 0
    update_bytes: int = 0
    update_peak_bytes: int = 0
    optimizer_seconds: tuple[float, ...] = ()
    weight_seconds: tuple[float, ...] = ()
    sum_seconds: float = 0.0
    early_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Flow:
    """A value computed by unit `producer`, sent once to each other stage with a consumer."""

    producer: int
    consumers: tuple[int, ...]
    forward_bytes: int
    gradient_bytes: int = 0

    def incoming_bytes(self, in_flight: int) -> int:
        """Memory at a consuming stage: kept by each microbatch in flight, one receive posted
        ahead, one gradient on its way back."""
        return (in_flight + 1) * self.forward_bytes + self.gradient_bytes

    def outgoing_bytes(self, in_flight: int) -> int:
        """Memory at the producing stage: sends under way, one gradient posted ahead."""
        return max(in_flight - 1, 1) * self.forward_bytes + self.gradient_bytes


@dataclass(frozen=True, slots=True)
class Shared:
    """Something that each stage with one of `users` holds (parameter) or recomputes (nodes).

    `reduced_bytes` is the gradient that the stages holding a tied parameter sum over each other,
    `sum_seconds` and `early_seconds` what summing it over the ranks of a stage takes, once a step
    or once a microbatch.
    """

    name: str
    users: tuple[int, ...]
    forward_seconds: tuple[float, ...]
    static_bytes: int = 0
    saved_bytes: int = 0
    transient_bytes: int = 0
    update_bytes: int = 0
    update_peak_bytes: int = 0
    optimizer_seconds: tuple[float, ...] = ()
    reduced_bytes: int = 0
    sum_seconds: float = 0.0
    early_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class DeviceClass:
    """Interchangeable devices (cluster indices), all of one type, memory and link neighbourhood."""

    type: int
    memory_bytes: int
    devices: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StageProblem:
    """See the module docstring.

    Args:
        links: `links[a][b]` joins a device of class a with another one of class b.
        sync_link: the slowest link, at whose pace tied gradients are reduced.
        schedule: `1f1b`, `gpipe` or `forward`.
        stage_pins: (unit, stage) pairs.
        class_pins: (unit, class) pairs: the unit's stage runs on a device of that class.
        overlap: how computation hides sums of gradients.
        held: link of what a message holds either of its ends up for in the steady state.
    """

    units: tuple[Unit, ...]
    flows: tuple[Flow, ...]
    shared: tuple[Shared, ...]
    classes: tuple[DeviceClass, ...]
    links: tuple[tuple[Link, ...], ...]
    sync_link: Link
    num_microbatches: int
    schedule: str
    stage_pins: tuple[tuple[int, int], ...] = ()
    class_pins: tuple[tuple[int, int], ...] = ()
    overlap: Overlap = Overlap()
    held: Link = Link(0.0, math.inf)

    @property
    def num_devices(self) -> int:
        return sum(len(entry.devices) for entry in self.classes)

    @property
    def trains(self) -> bool:
        return self.schedule != "forward"

    def edges(self) -> tuple[tuple[int, int], ...]:
        """Distinct (producer, consumer) pairs, sorted."""
        pairs = {(flow.producer, user) for flow in self.flows for user in flow.consumers}
        return tuple(sorted(pair for pair in pairs if pair[0] != pair[1]))

    def in_flight(self, num_stages: int, stage: int) -> int:
        """Microbatches whose saved tensors `stage` of `num_stages` holds at its peak."""
        return in_flight_microbatches(self.schedule, self.num_microbatches, num_stages, stage)


@dataclass(frozen=True, slots=True)
class Assignment:
    """A partition: `stages[u]` of every unit, `classes[s]` of the device of every stage."""

    stages: tuple[int, ...]
    classes: tuple[int, ...]

    @property
    def num_stages(self) -> int:
        return len(self.classes)

    def devices(self, problem: StageProblem) -> tuple[int, ...]:
        """The device of each stage: those of a class are used in ascending order."""
        used: Counter[int] = Counter()
        devices = []
        for index in self.classes:
            devices.append(problem.classes[index].devices[used[index]])
            used[index] += 1
        return tuple(devices)


def in_flight_microbatches(
    schedule: str, num_microbatches: int, num_stages: int, stage: int
) -> int:
    """1F1B: one microbatch for each stage from here to the last; GPipe: all; forward-only: one."""
    if schedule == "1f1b":
        return min(num_microbatches, num_stages - stage)
    return num_microbatches if schedule == "gpipe" else 1


def topological_order(
    num_units: int, edges: tuple[tuple[int, int], ...], rank: Callable[[int], object]
) -> tuple[int, ...]:
    """Units in topological order; of those that are ready, the one of least `rank(unit)` first.

    Raises:
        ValueError: the edges have a cycle.
    """
    import heapq

    waiting = [0] * num_units
    after: list[list[int]] = [[] for _ in range(num_units)]
    for source, target in edges:
        waiting[target] += 1
        after[source].append(target)
    heap = [(rank(unit), unit) for unit in range(num_units) if waiting[unit] == 0]
    heapq.heapify(heap)
    order = []
    while heap:
        unit = heapq.heappop(heap)[1]
        order.append(unit)
        for user in after[unit]:
            waiting[user] -= 1
            if waiting[user] == 0:
                heapq.heappush(heap, (rank(user), user))
    if len(order) != num_units:
        raise ValueError("the units have a cycle")
    return tuple(order)
