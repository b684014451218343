"""Random small latency problems, and their optima by trying everything.

The evaluation here shares nothing with `cost_models.placement`: pieces are single operators that
are put behind each other one at a time.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator

from cutset.compiler.ir.workload import DeviceKind, Operator, Workload


def random_latency_workload(
    seed: int, *, most_operators: int = 9, most_devices: int = 3
) -> Workload:
    """A graph with some of: a host, several kinds of machine, colours, memory, gaps in support."""
    rng = random.Random(seed)
    kinds = _random_kinds(rng, rng.randint(1, most_devices))
    count = rng.randint(1, most_operators)
    coloured, partly = rng.random() < 0.4, rng.random() < 0.4
    unit = rng.choice([1.0, 0.1, 1e-3])
    present = [k for k, kind in enumerate(kinds) if kind.count]
    operators = []
    for v in range(count):
        times: list[float | None] = [
            rng.randint(0, 12) * unit * (rng.choice([1, 4]) if kind.concurrent else 1)
            for kind in kinds
        ]
        if partly and len(present) > 1 and rng.random() < 0.3:
            times[rng.choice(present)] = None
        heavy = rng.choice([1, 1, 5])
        transfers = tuple(
            0.0 if kind.concurrent else rng.choice([0, 1]) * rng.randint(0, 4) * heavy * unit
            for kind in kinds
        )
        colour = f"c{rng.randrange(4)}" if coloured and rng.random() < 0.5 else None
        operators.append(
            Operator(f"v{v}", tuple(times), transfers, float(rng.randint(0, 10)), colour=colour)
        )
    density = rng.choice([0.15, 0.3, 0.6])
    place = list(range(count))
    if rng.random() < 0.5:
        rng.shuffle(place)
    edges = tuple(
        (place[u], place[v])
        for u, v in itertools.combinations(range(count), 2)
        if rng.random() < density
    )
    by_place = sorted(range(count), key=place.__getitem__)
    return Workload(kinds, tuple(operators[v] for v in by_place), edges)


def _random_kinds(rng: random.Random, num_devices: int) -> tuple[DeviceKind, ...]:
    kinds = []
    if rng.random() < 0.6:
        kinds.append(DeviceKind("host", 1, rng.choice([None, None, 25.0]), concurrent=True))
        num_devices -= 1
    while num_devices:
        n = rng.randint(1, num_devices)
        memory = rng.choice([None, None, 12.0, 20.0, 35.0])
        kinds.append(DeviceKind(f"kind{len(kinds)}", n, memory))
        num_devices -= n
    return tuple(kinds)


def placements(workload: Workload) -> Iterator[tuple[int, ...]]:
    """Every placement that respects support, colours and memory; machines that are alike are opened
    in their order."""
    kind_of = workload.kind_of
    count = len(workload.operators)

    def extend(chosen: list[int]) -> Iterator[tuple[int, ...]]:
        v = len(chosen)
        if v == count:
            yield tuple(chosen)
            return
        operator = workload.operators[v]
        fresh = set()
        for d in range(workload.num_devices):
            kind = kind_of[d]
            if operator.times[kind] is None:
                continue
            if d not in chosen:
                if kind in fresh:
                    continue
                fresh.add(kind)
            if operator.colour is not None and any(
                workload.operators[u].colour == operator.colour and chosen[u] != d for u in range(v)
            ):
                continue
            limit = workload.kinds[kind].memory
            held = operator.size + sum(
                workload.operators[u].size for u in range(v) if chosen[u] == d
            )
            if limit is not None and held > limit:
                continue
            yield from extend([*chosen, d])

    yield from extend([])


def contiguous_latency(workload: Workload, placement: tuple[int, ...]) -> float:
    """Latency with one piece a machine; infinite: the pieces wait for each other."""
    host = [workload.kinds[k].concurrent for k in workload.kind_of]
    ready: dict[int, float] = {}
    left = set(range(len(placement)))
    while left:
        done = None
        for v in sorted(left):
            mine = {v} if host[placement[v]] else {u for u in left if placement[u] == placement[v]}
            inputs = {a for a, b in workload.edges if b in mine} - mine
            if inputs <= set(ready):
                done = mine, inputs
                break
        if done is None:
            return math.inf
        mine, inputs = done
        device = placement[min(mine)]
        span = sum(workload.operators[v].times[workload.kind_of[device]] or 0.0 for v in mine)
        if not host[device]:
            leaving = {a for a, b in workload.edges if a in mine and b not in mine}
            span += sum(
                workload.operators[u].transfers[workload.kind_of[device]] for u in inputs | leaving
            )
        end = max((ready[u] for u in inputs), default=0.0) + span
        ready.update(dict.fromkeys(mine, end))
        left -= mine
    return max(ready.values())


def free_latency(workload: Workload, placement: tuple[int, ...], below: float) -> float:
    """Least latency over all orders of the operators of every machine, or something not below the
    given value."""
    count = len(placement)
    kind_of = workload.kind_of
    host = [workload.kinds[k].concurrent for k in kind_of]
    inputs = [[a for a, b in workload.edges if b == v] for v in range(count)]
    readers = [[b for a, b in workload.edges if a == v] for v in range(count)]
    best = below

    def span(v: int, moved: frozenset[tuple[int, int]]) -> float:
        device = placement[v]
        total = workload.operators[v].times[kind_of[device]] or 0.0
        if not host[device]:
            if any(placement[r] != device for r in readers[v]):
                total += workload.operators[v].transfers[kind_of[device]]
            for u in inputs[v]:
                if placement[u] != device and (u, device) not in moved:
                    total += workload.operators[u].transfers[kind_of[device]]
        return total

    def extend(
        ready: dict[int, float], free: dict[int, float], moved: frozenset[tuple[int, int]]
    ) -> None:
        nonlocal best
        if max(ready.values(), default=0.0) >= best:
            return
        if len(ready) == count:
            best = max(ready.values())
            return
        able = [v for v in range(count) if v not in ready and all(u in ready for u in inputs[v])]
        on_host = [v for v in able if host[placement[v]]]
        for v in on_host[:1] or able:  # nothing is lost by running what is on the host at once
            device = placement[v]
            start = max([ready[u] for u in inputs[v]], default=0.0)
            if not host[device]:
                start = max(start, free.get(device, 0.0))
            end = start + span(v, moved)
            extend(
                {**ready, v: end},
                free if host[device] else {**free, device: end},
                moved | {(u, device) for u in inputs[v]},
            )

    extend({}, {}, frozenset())
    return best


def optimum(workload: Workload, *, contiguous: bool) -> float | None:
    """The least latency of all placements; None: none is legal."""
    best = math.inf
    for placement in placements(workload):
        if contiguous:
            best = min(best, contiguous_latency(workload, placement))
        else:
            best = free_latency(workload, placement, best)
    return best if best < math.inf else None
