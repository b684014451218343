"""The best contiguous pieces of one topological order, by dynamic programming over intervals.

    best[used][j] = min over kinds k and i <= j of max(best[used - one k][i], load_k(i, j))

where `used` counts the devices of every kind that hold the first j units. After Tarnawski et al.
(NeurIPS 2020), whose programme runs over all down-sets instead of one order's prefixes; with many
devices of several kinds, the kinds of the stages are taken from given sequences instead.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from .feasibility import MEMORY_TOLERANCE
from .problem import Floats, Integers, PlacementProblem

__all__ = ["Pieces", "best_pieces", "blocks_of_order", "interval_loads", "pieces_seconds"]

_MOST_CELLS = 6e7  # of all tables of one order
_CELLS_A_SECOND, _UNITS_A_SECOND = 2.4e8, 1e5
_MOST_BLOCKS = 1200
_SEQUENCES = 4


@dataclass(frozen=True, slots=True)
class Pieces:
    """A slot of every unit, and the slots in the order in which the pieces follow each other."""

    slot_of: tuple[int, ...]
    sequence: tuple[int, ...]


def best_pieces(problem: PlacementProblem, order: Sequence[int], *, seed: int = 0) -> Pieces | None:
    """Pieces of an order whose largest load is least; None: no interval of it fits anywhere.

    Exact for the order where it has few units and the devices have few kinds; otherwise the ends
    of pieces are restricted to where little is open, and kinds follow some sequences.
    """
    all_states, _, blocks = _size(problem)
    block_of = blocks_of_order(problem, order, blocks)
    loads = interval_loads(problem, order, block_of)
    if all_states:
        found = _over_all_counts(problem, loads)
    else:
        tried = [_over_sequence(loads, kinds) for kinds in _sequences(problem, seed)]
        found = min(tried, key=lambda pair: pair[0])
    value, stages = found
    return None if math.isinf(value) else _decode(problem, order, block_of, stages)


def pieces_seconds(problem: PlacementProblem) -> float:
    """What the best pieces of one order usually take to find."""
    _, steps, blocks = _size(problem)
    return steps * blocks**2 / _CELLS_A_SECOND + problem.num_units / _UNITS_A_SECOND


def _size(problem: PlacementProblem) -> tuple[bool, int, int]:
    """Whether all counts of kinds are gone through, steps of the programme, and blocks."""
    states = math.prod(count + 1 for count in problem.counts) * len(problem.counts)
    all_states = states <= _most_steps(problem)
    steps = states if all_states else _SEQUENCES * problem.num_devices
    blocks = min(problem.num_units, _MOST_BLOCKS, int((_MOST_CELLS / steps) ** 0.5) + 1)
    return all_states, steps, blocks


def _most_steps(problem: PlacementProblem) -> int:
    """Steps of the exact programme that are worth more than sequences of kinds."""
    return 16 * problem.num_devices if problem.num_units > _MOST_BLOCKS else 3000


def blocks_of_order(problem: PlacementProblem, order: Sequence[int], count: int) -> Integers:
    """[units] block of every position of the order: one each, or `count` that end where least is
    open, of about the same work."""
    size = len(order)
    if count >= size:
        return np.arange(size, dtype=np.int64)
    position = np.empty(size, dtype=np.int64)
    position[list(order)] = np.arange(size)
    opened = np.zeros(size + 1)
    highest = problem.fees.max(axis=1)
    for pins, fee in zip(problem.pins, highest.tolist(), strict=True):
        places = position[list(pins)]
        opened[places.min() + 1] += fee
        opened[places.max() + 1] -= fee
    opened = np.cumsum(opened)
    fastest = problem.times.min(axis=1)[list(order)]
    weight = np.cumsum(fastest / max(fastest.sum(), 1e-300) + 1 / size) * (count - 1) / 2
    window = np.minimum(weight.astype(np.int64), count - 2)
    ends = np.zeros(size, dtype=np.int64)
    starts = np.flatnonzero(np.diff(window, prepend=-1))
    for begin, end in itertools.pairwise([*starts.tolist(), size]):
        if begin:
            ends[begin + int(np.argmin(opened[begin:end]))] = 1
    blocks: Integers = np.cumsum(ends)
    return blocks


def interval_loads(
    problem: PlacementProblem, order: Sequence[int], block_of: Integers
) -> list[Floats]:
    """For every kind, [blocks + 1, blocks + 1] load of a device with blocks i to j - 1; inf where
    they do not fit, and for i >= j."""
    size, kinds = int(block_of[-1]) + 1, len(problem.devices)
    of_unit = np.empty(len(order), dtype=np.int64)
    of_unit[list(order)] = block_of
    crossing = _crossing_fees(problem, of_unit, size)
    sizes = np.bincount(of_unit, weights=problem.sizes, minlength=size)
    used = _between(sizes)
    empty = np.tri(size + 1, dtype=bool)
    loads = []
    for kind in range(kinds):
        times = problem.times[:, kind]
        missing = np.isinf(times)
        load = _between(np.bincount(of_unit, weights=np.where(missing, 0, times), minlength=size))
        load += crossing[kind]
        lacking = _between(np.bincount(of_unit, weights=missing, minlength=size))
        over = used > problem.memory[kind] * (1 + MEMORY_TOLERANCE)
        load[empty | over | (lacking > 0.5)] = np.inf
        loads.append(load)
    return loads


def _between(amounts: Floats | Integers) -> Floats:
    """[i, j] sum of amounts i to j - 1."""
    total = np.concatenate([[0.0], np.cumsum(amounts)])
    between: Floats = total[None, :] - total[:, None]
    return between


def _crossing_fees(problem: PlacementProblem, of_unit: Integers, size: int) -> list[Floats]:
    """For every kind, [i, j] fees of the nets with a pin in the blocks i to j - 1 and one outside.

    A net costs an interval nothing that has none of its pins (it lies between two neighbouring
    pins) or all of them: rectangles of (i, j), summed by their corners.
    """
    corners: list[tuple[int, int, int, int]] = []  # i from, i to, j from, j to (exclusive)
    owners: list[int] = []
    counted = np.zeros(len(problem.pins))
    labels = of_unit.tolist()
    for net, pins in enumerate(problem.pins):
        places = sorted({labels[unit] for unit in pins})
        if len(places) < 2:
            continue
        counted[net] = 1
        free = [
            (before + 1, after + 1, 0, after + 1)
            for before, after in itertools.pairwise([-1, *places, size])
        ]
        free.append((0, places[0] + 1, places[-1] + 1, size + 1))
        corners += free
        owners += [net] * len(free)
    if not corners:
        return [np.zeros((size + 1, size + 1)) for _ in problem.devices]
    i0, i1, j0, j1 = np.array(corners).T
    width = size + 2
    flat = np.concatenate([i0 * width + j0, i1 * width + j1, i0 * width + j1, i1 * width + j0])
    result = []
    for kind in range(len(problem.devices)):
        fee = problem.fees[:, kind]
        weights = fee[owners]
        table = np.bincount(
            flat,
            weights=np.concatenate([weights, weights, -weights, -weights]),
            minlength=width * width,
        ).reshape(width, width)
        free_fees = table.cumsum(axis=0).cumsum(axis=1)[:-1, :-1]
        result.append(np.maximum((fee * counted).sum() - free_fees, 0.0))
    return result


_Stage = tuple[int, int, int]  # kind, first block, block after the last


def _over_all_counts(problem: PlacementProblem, loads: list[Floats]) -> tuple[float, list[_Stage]]:
    """Value and stages over all sequences of kinds."""
    last = len(loads[0]) - 1
    start = np.full(last + 1, np.inf)
    start[0] = 0.0
    best: dict[tuple[int, ...], Floats] = {}
    for used in itertools.product(*(range(count + 1) for count in problem.counts)):
        value = start.copy() if not any(used) else np.full(last + 1, np.inf)
        for kind, before in _one_less(used):
            np.minimum(value, _extend(best[before], loads[kind]), out=value)
        best[used] = value
    used = min(best, key=lambda one: (best[one][last], sum(one)))
    least = float(best[used][last])
    stages: list[_Stage] = []
    end = last
    if math.isinf(least):
        return least, stages
    while end:
        goal = best[used][end]
        for kind, before in _one_less(used):
            reached = np.maximum(best[before], loads[kind][:, end])
            begin = int(np.argmin(reached))
            if reached[begin] <= goal:
                stages.append((kind, begin, end))
                used, end = before, begin
                break
        else:
            raise AssertionError("the table has no predecessor for its own value")
    return least, stages[::-1]


def _one_less(used: tuple[int, ...]) -> Iterator[tuple[int, tuple[int, ...]]]:
    for kind, count in enumerate(used):
        if count:
            yield kind, (*used[:kind], count - 1, *used[kind + 1 :])


def _extend(reached: Floats, load: Floats) -> Floats:
    least: Floats = np.maximum(reached[:, None], load).min(axis=0)
    return least


def _over_sequence(loads: list[Floats], kinds: Sequence[int]) -> tuple[float, list[_Stage]]:
    """Value and stages if the stages' kinds are a subsequence of the given ones."""
    last = len(loads[0]) - 1
    reached = np.full(last + 1, np.inf)
    reached[0] = 0.0
    tables = [reached]
    for kind in kinds:
        tables.append(np.minimum(tables[-1], _extend(tables[-1], loads[kind])))
    stages: list[_Stage] = []
    value, end = float(tables[-1][last]), last
    if math.isinf(value):
        return value, []
    for number in range(len(kinds), 0, -1):
        if tables[number - 1][end] <= tables[number][end]:
            continue
        column = np.maximum(tables[number - 1], loads[kinds[number - 1]][:, end])
        begin = int(np.argmin(column))
        stages.append((kinds[number - 1], begin, end))
        end = begin
    return value, stages[::-1]


def _sequences(problem: PlacementProblem, seed: int) -> list[tuple[int, ...]]:
    """Kinds in order, reversed, and shuffled."""
    straight = problem.slots
    shuffled = [
        tuple(random.Random(seed * 100 + number).sample(straight, len(straight)))
        for number in range(_SEQUENCES - 2)
    ]
    return [straight, straight[::-1], *shuffled]


def _decode(
    problem: PlacementProblem, order: Sequence[int], block_of: Integers, stages: list[_Stage]
) -> Pieces:
    """Slots in the order of stages; devices without a piece come last."""
    free = [
        [slot for slot, kind in enumerate(problem.slots) if kind == k]
        for k in range(len(problem.devices))
    ]
    slot_of = [0] * problem.num_units
    sequence = []
    blocks = block_of.tolist()
    position = 0
    for kind, _, end in stages:
        slot = free[kind].pop(0)
        sequence.append(slot)
        while position < len(order) and blocks[position] < end:
            slot_of[order[position]] = slot
            position += 1
    unused = [slot for group in free for slot in group]
    return Pieces(tuple(slot_of), (*sequence, *unused))
