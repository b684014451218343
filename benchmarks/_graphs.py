"""Random and model-like operator graphs for `placement.py`: nothing is downloaded."""

from __future__ import annotations

import random
from collections.abc import Callable

import networkx as nx

from cutset.compiler.ir.workload import DeviceKind, Operator, Workload

__all__ = ["FAMILIES", "generate"]

_MIB = 1 << 20
Edges = list[tuple[int, int]]


def generate(family: str, num_operators: int, num_devices: int, seed: int = 0) -> Workload:
    """A workload of a family, with about so many operators, accelerators and one CPU.

    Accelerators hold 1.6 times their share of all bytes; operators are about 10 times as fast on
    them; the first operators, one in 40, run on the CPU only, as lookups and decoding do.
    """
    rng = random.Random(f"{family}{num_operators}x{num_devices}:{seed}")
    count, edges = FAMILIES[family](rng, num_operators)
    order = list(nx.lexicographical_topological_sort(nx.DiGraph(edges)))
    cpu_only = set(order[: count // 40])
    operators = []
    for v in range(count):
        time = rng.lognormvariate(0.0, 1.0)
        size = float(int(rng.lognormvariate(0.0, 1.0) * _MIB))
        cost = 0.2 * rng.lognormvariate(0.0, 1.0)
        operators.append(
            Operator(
                f"{family}{v}",
                (time * rng.uniform(5, 15), None if v in cpu_only else time),
                (0.0, cost),
                size,
            )
        )
    total = sum(operator.size for operator in operators)
    kinds = (
        DeviceKind("cpu", 1, concurrent=True),
        DeviceKind("accelerator", num_devices, memory=1.6 * total / num_devices + 20 * _MIB),
    )
    return Workload(kinds, tuple(operators), tuple(edges))


def _series_parallel(rng: random.Random, size: int) -> tuple[int, Edges]:
    """Starts from one edge; edges are subdivided or doubled at random."""
    edges: Edges = [(0, 1)]
    count = 2
    while count < size:
        position = rng.randrange(len(edges))
        u, v = edges[position]
        if rng.random() < 0.5:  # in series
            edges[position] = (u, count)
            edges.append((count, v))
        else:  # in parallel
            edges += [(u, count), (count, v)]
        count += 1
    return count, sorted(set(edges))


def _layered(rng: random.Random, size: int) -> tuple[int, Edges]:
    """Layers about half the root of the size wide; operators read 1 to 3 of the layer before."""
    width = max(2, int(size**0.5 / 2))
    edges: set[tuple[int, int]] = set()
    for v in range(width, size):
        first = (v // width - 1) * width
        for _ in range(rng.randint(1, 3)):
            edges.add((first + rng.randrange(width), v))
    return size, sorted(edges)


def _transformer(rng: random.Random, size: int) -> tuple[int, Edges]:
    """Blocks: norm, three projections, attention, output, sum, norm, up, activation, down, sum."""
    edges: Edges = []
    last = 0
    count = 1
    while count < size:
        norm, q, k, v, score, mix, out, add, norm2, up, act, down, add2 = range(count, count + 13)
        edges += [(last, norm), (norm, q), (norm, k), (norm, v), (q, score), (k, score)]
        edges += [(score, mix), (v, mix), (mix, out), (out, add), (last, add), (add, norm2)]
        edges += [(norm2, up), (up, act), (act, down), (down, add2), (add, add2)]
        last, count = add2, count + 13
    return count, edges


def _inception(rng: random.Random, size: int) -> tuple[int, Edges]:
    """Modules of four branches of one to five operators, joined by a concatenation."""
    edges: Edges = []
    last = 0
    count = 1
    while count < size:
        ends = []
        for _ in range(4):
            before = last
            for _ in range(rng.randint(1, 5)):
                edges.append((before, count))
                before, count = count, count + 1
            ends.append(before)
        edges += [(end, count) for end in ends]
        last, count = count, count + 1
    return count, edges


FAMILIES: dict[str, Callable[[random.Random, int], tuple[int, Edges]]] = {
    "series-parallel": _series_parallel,
    "layered": _layered,
    "transformer": _transformer,
    "inception": _inception,
}
