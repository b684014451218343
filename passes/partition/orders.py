"""Orders to try: topological orders of units, and sequences of devices for the stages."""

from __future__ import annotations

import random
from collections.abc import Callable

from .downsets import DeviceOrders
from .problem import StageProblem, topological_order

__all__ = ["device_orders", "devices_by_index", "topological_orders"]


def topological_orders(problem: StageProblem, *, count: int, seed: int) -> list[tuple[int, ...]]:
    """Program order, orders by distance from sources and to sinks, and random ones; distinct."""
    size, edges = len(problem.units), problem.edges()
    program = topological_order(size, edges, lambda unit: unit)
    early, late = _levels(size, edges, program)
    ranks = [early, late]
    for number in range(count - 3):
        ranks.append(random.Random(seed * 1000 + number).sample(range(size), size))
    orders = [program, *(topological_order(size, edges, rank.__getitem__) for rank in ranks)]
    return list(dict.fromkeys(orders[:count]))


def _levels(
    count: int, edges: tuple[tuple[int, int], ...], order: tuple[int, ...]
) -> tuple[list[int], list[int]]:
    """Longest path from a source to each unit, and minus that from each unit to a sink."""
    early, late = [0] * count, [0] * count
    position = {unit: index for index, unit in enumerate(order)}
    for source, target in sorted(edges, key=lambda edge: position[edge[0]]):
        early[target] = max(early[target], early[source] + 1)
    for source, target in sorted(edges, key=lambda edge: -position[edge[1]]):
        late[source] = min(late[source], late[target] - 1)
    return early, late


def device_orders(
    problem: StageProblem, num_stages: int, most_arcs: int
) -> tuple[tuple[DeviceOrders, ...], bool]:
    """All device sequences if they are few enough, else some good ones; whether they are all.

    The good ones keep devices of a class together: by index, fastest first or last, most memory
    first (early stages keep more microbatches in flight). Devices that are all alike are taken by
    index.
    """
    if len(problem.classes) == 1:
        return (DeviceOrders.of_sequence((0,) * num_stages),), True
    counts = tuple(len(entry.devices) for entry in problem.classes)
    every = DeviceOrders.all(counts, num_stages, most_arcs)
    if every is not None:
        return (every,), True
    by_index = devices_by_index(problem)
    if len({(entry.type, entry.memory_bytes) for entry in problem.classes}) == 1:
        sequence = tuple(cls for _, cls in by_index[:num_stages])
        return (DeviceOrders.of_sequence(sequence),), False
    speed = [
        sum(unit.forward_seconds[entry.type] for unit in problem.units) for entry in problem.classes
    ]
    memory = [entry.memory_bytes for entry in problem.classes]
    ranks: tuple[Callable[[tuple[int, int]], tuple[float, int]], ...] = (
        lambda item: (0.0, item[0]),
        lambda item: (speed[item[1]], item[0]),
        lambda item: (-speed[item[1]], item[0]),
        lambda item: (-memory[item[1]], item[0]),
    )
    chosen = []
    for rank in ranks:
        ordered = sorted(by_index, key=rank)
        chosen.append(tuple(cls for _, cls in ordered[:num_stages]))
    sequences = dict.fromkeys([*chosen, *(tuple(reversed(item)) for item in chosen)])
    return tuple(DeviceOrders.of_sequence(item) for item in sequences), False


def devices_by_index(problem: StageProblem) -> list[tuple[int, int]]:
    """(device, class) pairs in the order of the cluster."""
    return sorted(
        (device, cls) for cls, entry in enumerate(problem.classes) for device in entry.devices
    )
