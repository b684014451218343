"""Balanced cuts by a library: METIS where its Python binding is installed, else Kernighan-Lin.

A cut looks at undirected edges weighted by transfer times and at the work of vertices; it knows
neither kinds of device nor memory nor order, so that units are moved afterwards from devices that
cannot hold them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import networkx as nx
import numpy as np

from .feasibility import MEMORY_TOLERANCE
from .problem import Floats, PlacementProblem

__all__ = ["balanced_cut", "cut_library"]

_SCALE = 1_000_000  # METIS takes whole weights
_MOST_PASSES = 4  # of Kernighan-Lin
_MOST_PINS = 16  # of a net that becomes a clique; larger ones become a star


def cut_library() -> str:
    """The library that balanced cuts come from on this machine."""
    return "pymetis" if importlib.util.find_spec("pymetis") else "networkx (Kernighan-Lin)"


def balanced_cut(
    problem: PlacementProblem, order: Sequence[int], slots: Sequence[int]
) -> list[int] | None:
    """A slot of every unit, from a cut into as many parts as `slots`; None: no room was found.

    Args:
        order: units in a topological order, which Kernighan-Lin starts from.
        slots: devices to cut for.
    """
    weights = problem.times.min(axis=1)
    edges = _edges(problem)
    if cut_library() == "pymetis":
        parts = _metis(problem.num_units, edges, weights, len(slots))
    else:
        parts = _recursive(edges, weights, list(order), len(slots))
    slot_of = [0] * problem.num_units
    for part, units in enumerate(parts):
        for unit in units:
            slot_of[unit] = slots[part]
    return _repaired(problem, slot_of)


def _edges(problem: PlacementProblem) -> dict[tuple[int, int], float]:
    """Undirected edges between the pins of each net, with the weight of its fee shared out."""
    edges: dict[tuple[int, int], float] = {}
    for pins, fee in zip(problem.pins, problem.fees.max(axis=1).tolist(), strict=True):
        if len(pins) <= _MOST_PINS:
            pairs = [(a, b) for n, a in enumerate(pins) for b in pins[n + 1 :]]
        else:
            pairs = [(pins[0], b) for b in pins[1:]]
        for pair in pairs:
            edges[pair] = edges.get(pair, 0.0) + fee / (len(pins) - 1)
    return edges


def _metis(
    count: int, edges: dict[tuple[int, int], float], weights: Floats, num_parts: int
) -> list[list[int]]:
    pymetis = importlib.import_module("pymetis")
    neighbours: list[list[tuple[int, int]]] = [[] for _ in range(count)]
    heaviest = max(edges.values(), default=1.0) or 1.0
    for (a, b), weight in edges.items():
        whole = max(1, int(weight / heaviest * _SCALE))
        neighbours[a].append((b, whole))
        neighbours[b].append((a, whole))
    total = float(weights.sum()) or 1.0
    _, label = pymetis.part_graph(
        num_parts,
        adjacency=[[b for b, _ in one] for one in neighbours],
        eweights=[w for one in neighbours for _, w in one],
        vweights=[int(w / total * _SCALE) for w in weights.tolist()],
    )
    return [[v for v in range(count) if label[v] == part] for part in range(num_parts)]


def _recursive(
    edges: dict[tuple[int, int], float], weights: Floats, units: list[int], num_parts: int
) -> list[list[int]]:
    """Units in parts: bisected along their order by work, improved by exchanges, and so on."""
    if num_parts == 1 or len(units) < 2:
        return [units, *([[]] * (num_parts - 1))]
    left = num_parts // 2
    done = np.cumsum(weights[units])
    cut = int(np.searchsorted(done, done[-1] * left / num_parts)) + 1
    cut = min(max(cut, 1), len(units) - 1)
    graph = nx.Graph()
    graph.add_nodes_from(units)
    inside = set(units)
    graph.add_weighted_edges_from(
        (a, b, weight) for (a, b), weight in edges.items() if a in inside and b in inside
    )
    halves = nx.community.kernighan_lin_bisection(
        graph, partition=(set(units[:cut]), set(units[cut:])), max_iter=_MOST_PASSES, seed=0
    )
    first, second = ([v for v in units if v in half] for half in halves)
    own = {pair: w for pair, w in edges.items() if pair[0] in inside and pair[1] in inside}
    return [
        *_recursive(own, weights, first, left),
        *_recursive(own, weights, second, num_parts - left),
    ]


def _repaired(problem: PlacementProblem, slot_of: list[int]) -> list[int] | None:
    """The placement with units moved from slots that do not support or hold them, largest first,
    to the one that is free first."""
    kinds = problem.slots
    limits = (problem.memory * (1 + MEMORY_TOLERANCE))[list(kinds)].tolist()
    times, sizes = problem.times.tolist(), problem.sizes.tolist()
    used, load = [0.0] * len(kinds), [0.0] * len(kinds)
    homeless = []
    for unit in sorted(range(problem.num_units), key=lambda one: (-sizes[one], one)):
        slot = slot_of[unit]
        time = times[unit][kinds[slot]]
        if time == float("inf") or used[slot] + sizes[unit] > limits[slot]:
            homeless.append(unit)
            continue
        used[slot] += sizes[unit]
        load[slot] += time
    for unit in homeless:
        options = [
            (load[slot] + times[unit][kind], slot)
            for slot, kind in enumerate(kinds)
            if times[unit][kind] < float("inf") and used[slot] + sizes[unit] <= limits[slot]
        ]
        if not options:
            return None
        load_then, slot = min(options)
        slot_of[unit], load[slot] = slot, load_then
        used[slot] += sizes[unit]
    return slot_of
