"""Random small placement problems, and their optima by trying every placement.

The evaluation here shares nothing with `cost_models.placement`: it takes all placements at once.
"""

from __future__ import annotations

import itertools
import math
import random

import numpy as np

from cutset.compiler.ir.workload import DeviceKind, Operator, Workload

PLACEMENTS_AT_ONCE = 200_000


def random_workload(seed: int, *, most_operators: int = 10, most_devices: int = 3) -> Workload:
    """A connected-ish graph with some of: several kinds, colours, memory, gaps in support,
    backward operators. It may be infeasible; an operator that nothing supports is not made."""
    rng = random.Random(seed)
    kinds = _random_kinds(rng, rng.randint(1, most_devices))
    count = rng.randint(1, most_operators)
    coloured, partly = rng.random() < 0.5, rng.random() < 0.4
    training = rng.random() < 0.3
    forward = max(1, count // 2) if training else count
    unit = rng.choice([1.0, 0.125, 0.1, 1e-3])
    operators = []
    for v in range(count):
        backward = v >= forward
        colour = None
        if backward and rng.random() < 0.8:
            colour = f"c{count - 1 - v}"
        elif not backward and (training or (coloured and rng.random() < 0.5)):
            colour = f"c{v if training else rng.randrange(4)}"
        times: list[float | None] = [rng.randint(0, 20) * unit * rng.choice([1, 2]) for _ in kinds]
        present = [k for k, kind in enumerate(kinds) if kind.count]
        if partly and len(present) > 1 and rng.random() < 0.3:
            times[rng.choice(present)] = None
        heavy = rng.choice([1, 1, 5, 40])
        transfers = tuple(rng.choice([0, 1]) * rng.randint(0, 4) * heavy * unit for _ in kinds)
        size = float(rng.randint(0, 10))
        operators.append(
            Operator(f"v{v}", tuple(times), transfers, size, colour=colour, backward=backward)
        )
    density = rng.choice([0.15, 0.3, 0.6])
    edges = tuple(
        (u, v) for u, v in itertools.combinations(range(count), 2) if rng.random() < density
    )
    # positions need not be a topological order
    shuffled = list(range(count))
    if rng.random() < 0.5:
        rng.shuffle(shuffled)
    place = {old: new for new, old in enumerate(shuffled)}
    return Workload(
        kinds,
        tuple(operators[old] for old in shuffled),
        tuple((place[u], place[v]) for u, v in edges),
    )


def _random_kinds(rng: random.Random, num_devices: int) -> tuple[DeviceKind, ...]:
    counts = []
    while sum(counts) < num_devices:
        counts.append(rng.randint(1, num_devices - sum(counts)))
    if rng.random() < 0.2:
        counts.append(0)
    return tuple(
        DeviceKind(f"kind{k}", n, memory=rng.choice([None, None, 12.0, 20.0, 35.0]))
        for k, n in enumerate(counts)
    )


def optimum(workload: Workload, *, contiguous: bool) -> float | None:
    """The least largest load of all placements; None: none is legal."""
    devices, count = workload.num_devices, len(workload.operators)
    best = math.inf
    every = itertools.product(range(devices), repeat=count)
    while chunk := list(itertools.islice(every, PLACEMENTS_AT_ONCE)):
        loads, legal, acyclic = evaluate(workload, np.array(chunk).reshape(len(chunk), count))
        if contiguous:
            legal &= acyclic
        if legal.any():
            best = min(best, float(loads[legal].max(axis=1).min()))
    return best if best < math.inf else None


def evaluate(
    workload: Workload, placements: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[placements, devices] loads; [placements] whether legal, and whether the quotient graph over
    forward edges is acyclic."""
    devices = workload.num_devices
    kind_of = [k for k, kind in enumerate(workload.kinds) for _ in range(kind.count)]
    rows = len(placements)
    loads, legal = np.zeros((rows, devices)), np.ones(rows, dtype=bool)
    for d in range(devices):
        k = kind_of[d]
        held = np.zeros(rows)
        for v, operator in enumerate(workload.operators):
            here = placements[:, v] == d
            time = operator.times[k]
            legal &= ~here | (time is not None)
            loads[:, d] += here * (time or 0.0)
            held += here * operator.size
            others = [b for a, b in workload.edges if a == v]
            if others:
                there = placements[:, others]
                pays = here & (there != d).any(axis=1) | ~here & (there == d).any(axis=1)
                loads[:, d] += pays * operator.transfers[k]
        memory = workload.kinds[k].memory
        if memory is not None:
            legal &= held <= memory * (1 + 1e-9)
    for (u, a), (v, b) in itertools.combinations(enumerate(workload.operators), 2):
        if a.colour is not None and a.colour == b.colour:
            legal &= placements[:, u] == placements[:, v]
    reach = np.zeros((rows, devices, devices), dtype=bool)
    for u, v in workload.edges:
        if not (workload.operators[u].backward or workload.operators[v].backward):
            a, b = placements[:, u], placements[:, v]
            reach[np.arange(rows)[a != b], a[a != b], b[a != b]] = True
    for via in range(devices):
        reach |= reach[:, :, via, None] & reach[:, None, via, :]
    acyclic = ~reach[:, np.arange(devices), np.arange(devices)].any(axis=1)
    return loads, legal, acyclic
