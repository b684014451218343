"""How transfers that are under way at once share wires: max-min time sharing, fluid in time.

Every device has a port out and a port in for what stays in its node, and others for what leaves
it; CPU workers of one node share the node's. A transfer that has a port for itself runs at the
speed of its link, n transfers in a port at 1/n of it each. A ring's transfer loads a port by the
bandwidth of the ring over that of the port's link. Where a rule of the cluster says how many
`streams` a node carries at full speed, k of them in a node run at `streams / k`. The speed of a
transfer is the least that any of its places allows, and changes when others come and go. Latencies
take no bandwidth. Where threads of CPUs carry messages, a transfer keeps `progress_share` of its
speed, its latency included, while a device at one of its ends computes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass

from ..compiler.ir.cluster import Cluster
from .discrete_events import Clock, Process, Work

__all__ = ["Flow", "Wires"]


@dataclass(frozen=True, slots=True)
class Flow:
    """One transfer, or the ring of a collective.

    Args:
        edges: (source, target) devices between which it travels at once.
        latency_seconds, wire_seconds: how long it takes alone.
        collective: which, as links name them; None: a message.
        is_handled: whether all that it takes of computation is counted elsewhere: it slows none
            down, and its latency passes beside it.
    """

    edges: tuple[tuple[int, int], ...]
    latency_seconds: float
    wire_seconds: float
    collective: str | None = None
    is_handled: bool = False


@dataclass(frozen=True, slots=True)
class _Places:
    """Where a flow runs: load of every place, and what it takes from the devices that compute."""

    loads: tuple[tuple[Hashable, float], ...]
    devices: tuple[int, ...]
    compute_share: float
    progress_share: float


class Wires:
    """Transfers under way in a cluster.

    Args:
        slowed: told a device and the share of its computing rate that transfers now take.
    """

    def __init__(
        self, clock: Clock, cluster: Cluster, slowed: Callable[[int, float], None]
    ) -> None:
        self._clock = clock
        self._cluster = cluster
        self._slowed = slowed
        self._capacity: dict[Hashable, float] = {}
        self._load: dict[Hashable, float] = defaultdict(float)
        self._flows: dict[Hashable, dict[Work, _Places]] = defaultdict(dict)  # by place
        self._taken: dict[int, dict[Work, float]] = defaultdict(dict)  # by device
        self._places: dict[Hashable, _Places] = {}
        self._computing: set[int] = set()  # devices
        self._slowed_by: dict[int, dict[Work, _Places]] = defaultdict(dict)  # flows, by device

    def carry(self, flow: Flow) -> Process:
        """Carry `flow` from now to its end."""
        key = flow.edges, flow.collective, flow.is_handled
        if key not in self._places:
            self._places[key] = self._places_of(flow)
        places, seconds = self._places[key], flow.wire_seconds
        if places.progress_share < 1.0 and not flow.is_handled:
            seconds += flow.latency_seconds
        else:
            yield self._clock.later(flow.latency_seconds)
        if seconds <= 0.0:
            return
        work = Work(seconds)
        for device in places.devices if places.progress_share < 1.0 else ():
            self._slowed_by[device][work] = places
        for place, load in places.loads:
            self._load[place] += load
            self._flows[place][work] = places
        self._settle(places)
        yield work.end
        for place, load in places.loads:
            del self._flows[place][work]
            self._load[place] = self._load[place] - load if self._flows[place] else 0.0
        for device in places.devices:
            self._taken[device].pop(work, None)
            self._slowed_by[device].pop(work, None)
        self._settle(places)

    def computes(self, device: int, computing: bool) -> None:
        """`device` begins to compute, or is done with it."""
        (self._computing.add if computing else self._computing.discard)(device)
        if flows := self._slowed_by.get(device):
            self._speed(dict(flows), set())

    def _settle(self, changed: _Places) -> None:
        """New speeds for all that shares a place with what has come or gone."""
        touched = {
            work: places
            for place, _ in changed.loads
            for work, places in self._flows[place].items()
        }
        self._speed(touched, set(changed.devices))

    def _speed(self, flows: dict[Work, _Places], devices: set[int]) -> None:
        """New speeds for `flows`, and for what `devices` and those at their ends compute."""
        for work, places in flows.items():
            speed = min(self._share(place) for place, _ in places.loads)
            if places.progress_share < 1.0 and not self._computing.isdisjoint(places.devices):
                speed *= places.progress_share
            self._clock.set_speed(work, speed)
            if places.compute_share:
                for device in places.devices:
                    self._taken[device][work] = places.compute_share * speed
                devices.update(places.devices)
        for device in sorted(devices):
            self._slowed(device, sum(self._taken[device].values()))

    def _share(self, place: Hashable) -> float:
        load = self._load[place]
        capacity = self._capacity[place]
        return 1.0 if load <= capacity else capacity / load

    def _places_of(self, flow: Flow) -> _Places:
        links = [self._cluster.link(*edge, flow.collective) for edge in flow.edges]
        slowest = min(link.bytes_per_second for link in links)
        loads: dict[Hashable, float] = {}
        share, kept = 0.0, 1.0
        for edge, link in zip(flow.edges, links, strict=True):
            for place in self._ports(edge):
                self._capacity[place] = 1.0
                loads[place] = max(loads.get(place, 0.0), slowest / link.bytes_per_second)
            rule = self._cluster.rule(*edge)
            share, kept = max(share, rule.compute_share), min(kept, rule.progress_share)
            if rule.streams is not None:
                for device in edge:
                    place = (self._cluster.devices[device].node, rule)
                    self._capacity[place] = rule.streams
                    loads[place] = 1.0
        devices = tuple(sorted({device for edge in flow.edges for device in edge}))
        return _Places(tuple(loads.items()), devices, 0.0 if flow.is_handled else share, kept)

    def _ports(self, edge: tuple[int, int]) -> Iterable[Hashable]:
        source, target = (self._cluster.devices[device] for device in edge)
        inside = source.node == target.node
        for direction, device in (("out", source), ("in", target)):
            shared = not inside and self._cluster.type_of(device.index).backend == "cpu"
            yield direction, device.node if shared else device.index, inside
