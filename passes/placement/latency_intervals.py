"""Contiguous pieces of one topological order for latency, by dynamic programming over intervals.

    best[m][j] = min over i <= j of best[m - 1][i] + load_m(i, j),   best[m][j] = best[m - 1][j],
                 best[m][j - 1] + time of unit j - 1 on a host

is the least time of running intervals of the order one after another, the first j units on hosts
and the first m machines of a sequence. Nothing overlaps here, so that it is an upper estimate: the
placement is evaluated afterwards. It is exact on chains.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from ...compiler.ir.workload import Workload
from .intervals import _blocks as blocks_of_order
from .intervals import _interval_loads as interval_loads
from .problem import Floats, PlacementProblem, placement_problem

__all__ = ["interval_groups", "latency_units", "order_pieces"]

_MOST_CELLS = 6e7  # of all tables of one order
_MOST_BLOCKS = 900


def latency_units(workload: Workload) -> PlacementProblem:
    """The units of contiguous pieces: colours, and cycles of colours, as one. Latency knows no
    backward operators: every edge counts."""
    operators = tuple(replace(operator, backward=False) for operator in workload.operators)
    return placement_problem(Workload(workload.kinds, operators, workload.edges), contiguous=True)


def order_pieces(
    workload: Workload, units: PlacementProblem, order: Sequence[int], *, seed: int = 0
) -> Iterator[tuple[int, ...]]:
    """Contiguous placements from an order, the best for each of some sequences of machines."""
    for sequence in _sequences(workload, units, random.Random(seed)):
        slot_of = _best_intervals(workload, units, order, sequence)
        if slot_of is not None:
            yield units.placement(slot_of)


def interval_groups(
    workload: Workload, units: PlacementProblem, order: Sequence[int], count: int
) -> tuple[list[tuple[int, ...]], list[int]] | None:
    """Operators in up to `count` groups that are intervals of an order of units, and the device of
    every group by the dynamic program; None: it finds none."""
    (sequence, *_) = _sequences(workload, units, random.Random(0))
    slot_of = _best_intervals(workload, units, order, sequence, most_blocks=count)
    if slot_of is None:
        return None
    placement = units.placement(slot_of)
    block_of = blocks_of_order(units, order, min(count, units.num_units))
    groups = []
    pairs = zip(order, block_of.tolist(), strict=True)
    for _, run in itertools.groupby(pairs, key=lambda pair: pair[1]):
        groups.append(tuple(v for unit, _ in run for v in units.members[unit]))
    return groups, [placement[group[0]] for group in groups]


def _sequences(
    workload: Workload, units: PlacementProblem, generator: random.Random
) -> list[list[int]]:
    """Slots of machines, in orders in which their pieces may follow each other; at most as many
    as there are units."""
    machines = [
        slot
        for slot, kind in enumerate(units.slots)
        if not workload.kinds[workload.kind_of[units.devices[kind][0]]].concurrent
    ]
    speed = {
        kind: float(np.where(np.isinf(column), 0, column).sum())
        for kind, column in enumerate(units.times.T)
    }
    fastest = sorted(machines, key=lambda slot: (speed[units.slots[slot]], slot))
    if len({units.slots[slot] for slot in machines}) <= 1:
        return [fastest[: units.num_units]]
    mixed = sorted(machines, key=lambda slot: generator.random())
    return [fastest[: units.num_units], fastest[::-1][: units.num_units], mixed[: units.num_units]]


def _best_intervals(
    workload: Workload,
    units: PlacementProblem,
    order: Sequence[int],
    sequence: Sequence[int],
    *,
    most_blocks: int = _MOST_BLOCKS,
) -> list[int] | None:
    count = min(units.num_units, most_blocks, int((_MOST_CELLS / max(len(sequence), 1)) ** 0.5) + 1)
    block_of = blocks_of_order(units, order, count)
    loads = interval_loads(units, order, block_of)
    size = len(loads[0]) - 1
    hosts = [
        kind
        for kind, group in enumerate(units.devices)
        if workload.kinds[workload.kind_of[group[0]]].concurrent
    ]
    of_unit = np.empty(units.num_units, dtype=np.int64)
    of_unit[list(order)] = block_of
    alone = np.full((len(hosts) + 1, size), np.inf)
    for row, kind in enumerate(hosts):
        alone[row] = np.bincount(of_unit, weights=units.times[:, kind], minlength=size)
    on_host = alone.min(axis=0)
    best = [_through_hosts(np.concatenate([[0.0], np.full(size, np.inf)]), on_host)]
    for slot in sequence:
        taken = (best[-1][:, None] + loads[units.slots[slot]]).min(axis=0)
        best.append(_through_hosts(np.minimum(best[-1], taken), on_host))
    if np.isinf(best[-1][size]):
        return None
    return _decode(units, order, block_of, sequence, loads, best, on_host, alone, hosts)


def _through_hosts(value: Floats, on_host: Floats) -> Floats:
    """The values, where blocks may also be passed through on hosts."""
    result = value.tolist()
    for j, time in enumerate(on_host.tolist()):
        result[j + 1] = min(result[j + 1], result[j] + time)
    return np.array(result)


def _decode(
    units: PlacementProblem,
    order: Sequence[int],
    block_of: Floats,
    sequence: Sequence[int],
    loads: list[Floats],
    best: list[Floats],
    on_host: Floats,
    alone: Floats,
    hosts: Sequence[int],
) -> list[int]:
    """A slot of every unit, walking back through the tables."""
    first_slot = {kind: units.slots.index(kind) for kind in hosts}
    slot_of_block = [-1] * (len(best[0]) - 1)
    j, used = len(slot_of_block), len(sequence)
    while j:
        value = best[used][j]
        if used and value == best[used - 1][j]:
            used -= 1
        elif value == best[used][j - 1] + on_host[j - 1]:
            j -= 1
            slot_of_block[j] = first_slot[hosts[int(np.argmin(alone[:-1, j]))]]
        else:
            slot = sequence[used - 1]
            i = int(np.argmin(best[used - 1] + loads[units.slots[slot]][:, j]))
            slot_of_block[i:j] = [slot] * (j - i)
            j, used = i, used - 1
    slot_of = [-1] * units.num_units
    for unit, block in zip(order, block_of.tolist(), strict=True):
        slot_of[unit] = slot_of_block[int(block)]
    return slot_of
