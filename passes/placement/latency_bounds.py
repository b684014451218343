"""Bounds on latency from the longest path and from the work of machines, without a solver.

*Path*: each unit takes its time on some kind, and a result that changes kind is moved by whichever
of the two is a machine. The least finish per kind, over producers, is a longest-path recursion:

    least[v, k] = times[v][k] + max over producers u of min over kinds j of
                  (least[u, j] + [j != k] (fees of moving out of j, if a machine, and into k))

*Work*: a unit that would finish too late on every host has to be on a machine, and all machines
together have (number of machines) T of time. The largest T that cannot hold these units is a bound.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from .latency_problem import LatencyProblem, Net

__all__ = ["latency_bound"]

_STEPS = 60  # halvings of the interval that the work bound is searched in
_ROUNDING = 1e-12  # relative; sums of floats in another order


def latency_bound(problem: LatencyProblem) -> float:
    """No placement, whatever its pieces, has a smaller latency. For problems of single operators.

    Infinite where a unit fits on no device.
    """
    times = _possible_times(problem)
    if any(all(math.isinf(t) for t in row) for row in times):
        return math.inf
    order, entering, leaving = _arcs(problem)
    head = _least_finish(problem, times, order, entering, forwards=True)
    tail = _least_finish(problem, times, order[::-1], leaving, forwards=False)
    longest = max(min(row) for row in head)
    through = [
        [h + t - own for h, t, own in zip(*rows, strict=True)]
        for rows in zip(head, tail, times, strict=True)
    ]
    longest = max(longest, max(min(row) for row in through))
    return max(longest, _work_bound(problem, times, through)) * (1 - _ROUNDING)


def _possible_times(problem: LatencyProblem) -> list[list[float]]:
    """[units][kinds] time; infinite where the unit's group is not supported or does not fit."""
    kinds = range(len(problem.workload.kinds))
    present = set(problem.workload.kind_of)
    times = [
        [math.inf if t is None or k not in present else t for k, t in enumerate(row)]
        for row in problem.times
    ]
    for group in (*problem.tied, *((v,) for v in range(problem.num_units))):
        held = sum(problem.sizes[v] for v in group)
        for k in kinds:
            if held > problem.limit(k) * (1 + 1e-9) or any(math.isinf(times[v][k]) for v in group):
                for v in group:
                    times[v][k] = math.inf
    return times


_Arcs = list[list[tuple[int, Net]]]


def _arcs(problem: LatencyProblem) -> tuple[list[int], _Arcs, _Arcs]:
    """Units in topological order; the nets that enter each, with their producer; those that leave,
    with their readers."""
    entering: _Arcs = [[] for _ in range(problem.num_units)]
    leaving: _Arcs = [[] for _ in range(problem.num_units)]
    for net in problem.nets:
        for reader in net.readers:
            entering[reader].append((net.producer, net))
            leaving[net.producer].append((reader, net))
    waiting = [len(one) for one in entering]
    order = [v for v in range(problem.num_units) if not waiting[v]]
    for v in order:
        for reader, _ in leaving[v]:
            waiting[reader] -= 1
            if not waiting[reader]:
                order.append(reader)
    return order, entering, leaving


def _least_finish(
    problem: LatencyProblem,
    times: list[list[float]],
    order: Sequence[int],
    arcs: _Arcs,
    *,
    forwards: bool,
) -> list[list[float]]:
    """[units][kinds] least time from the start to a unit's end, or from its start to the end."""
    concurrent = [kind.concurrent for kind in problem.workload.kinds]
    kinds = range(len(concurrent))
    least = [[math.inf] * len(concurrent) for _ in order]
    for v in order:
        for k in kinds:
            if math.isinf(times[v][k]):
                continue
            behind = 0.0
            for u, net in arcs[v]:
                fee = [0.0 if host else fee for host, fee in zip(concurrent, net.fees, strict=True)]
                # both ends pay, whichever direction is looked at
                best = min(least[u][j] + (fee[j] + fee[k] if j != k else 0.0) for j in kinds)
                behind = max(behind, best)
            least[v][k] = times[v][k] + behind
    return least


def _work_bound(
    problem: LatencyProblem, times: list[list[float]], through: list[list[float]]
) -> float:
    """The largest latency at which the units that need a machine exceed the machines' time."""
    concurrent = [kind.concurrent for kind in problem.workload.kinds]
    work = []  # latency below which a unit needs a machine, and its least time there
    for unit_times, paths in zip(times, through, strict=True):
        on_hosts = [path for path, host in zip(paths, concurrent, strict=True) if host]
        on_machines = [t for t, host in zip(unit_times, concurrent, strict=True) if not host]
        least = min(on_machines, default=math.inf)
        if math.isfinite(least):
            work.append((min(on_hosts, default=math.inf), least))
    if not problem.machines:
        return 0.0
    low, high = 0.0, sum(least for _, least in work) / len(problem.machines)
    for _ in range(_STEPS):
        middle = (low + high) / 2
        needed = sum(least for needs_below, least in work if needs_below > middle)
        if needed > middle * len(problem.machines):
            low = middle
        else:
            high = middle
    return low
