"""Fewer pieces for a schedule of single operators, where that delays nothing."""

from __future__ import annotations

from collections.abc import Sequence

import networkx as nx

from ...compiler.ir.workload import Workload
from ...cost_models.placement import piece_latency

__all__ = ["joined_pieces"]

_MOST_OPERATORS = 400  # joining costs an evaluation of the whole graph a piece
_ROUNDING = 1e-12  # relative; the same times summed in another order


def joined_pieces(
    workload: Workload, placement: Sequence[int], pieces: Sequence[Sequence[int]]
) -> tuple[tuple[int, ...], ...]:
    """Pieces of the same latency, each joined with the next of its device where that is possible.

    A joined piece waits for all its inputs and keeps its results until its end, so that not all
    neighbours can be joined. Pieces of large graphs are left as they are.
    """
    current = [tuple(piece) for piece in pieces]
    value = piece_latency(workload, placement, current)
    assert value is not None
    if len(workload.operators) > _MOST_OPERATORS:
        return tuple(current)
    for device in sorted({placement[piece[0]] for piece in pieces}):
        here = 0
        while True:
            mine = [n for n, piece in enumerate(current) if placement[piece[0]] == device]
            if here + 1 >= len(mine):
                break
            first, second = mine[here], mine[here + 1]
            joined = list(current)
            joined[first] = current[first] + current[second]
            del joined[second]
            new = piece_latency(workload, placement, joined)
            if new is not None and new <= value * (1 + _ROUNDING):
                current = joined
            else:
                here += 1
    return _in_order(workload, placement, current)


def _in_order(
    workload: Workload, placement: Sequence[int], pieces: Sequence[tuple[int, ...]]
) -> tuple[tuple[int, ...], ...]:
    """The pieces, those that others wait for first."""
    number = {v: n for n, piece in enumerate(pieces) for v in piece}
    graph = nx.DiGraph()
    graph.add_nodes_from(range(len(pieces)))
    last: dict[int, int] = {}
    for n, piece in enumerate(pieces):
        if placement[piece[0]] in last:
            graph.add_edge(last[placement[piece[0]]], n)
        last[placement[piece[0]]] = n
    hosted = {v: len(pieces) + v for v in range(len(placement)) if v not in number}
    node = number | hosted
    graph.add_edges_from((node[u], node[v]) for u, v in workload.edges if node[u] != node[v])
    return tuple(pieces[n] for n in nx.lexicographical_topological_sort(graph) if n < len(pieces))
