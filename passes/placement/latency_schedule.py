"""Placement for latency where a machine may run several pieces, as a scheduling program for CP-SAT.

Splitting a piece into single operators, in an order of its own, never delays anything: each
operator starts no later, and together they take as long. So pieces are single units here, and a
machine runs its units one after another. For units v, edges u -> v, nets n = (producer u, readers)
and devices d:

    at[v,d] in {0,1};  sum over d = 1;  tied units agree;  memory                      `_places`
    first[v,j] among machines of a kind: unit v may open machine j only after j-1      `_symmetry`
    out[n] >= at[u,d] - at[r,d]     machine d moves net n out, for a reader r          `_moves`
    pay[n,r,d]: reader r moves n in, d being its machine: some reader of every         `_moves`
        machine other than the producer's does, and the machine's others follow it
    end[v] = start[v] + time + fees;  start[v] >= end[u];  T >= end[v]                 `_times`
    the intervals of a machine do not overlap;  sum of what a machine does <= T        `_times`
    minimise T
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import networkx as nx

from .latency_problem import LatencyProblem
from .latency_ticks import Found, Linear, Program, Ticks

__all__ = ["build_schedule"]


def build_schedule(
    problem: LatencyProblem, ticks: Ticks, hint: Sequence[int] | None = None
) -> Program:
    """The program for schedules of at most the horizon's value.

    Args:
        hint: the device of every unit in a placement to start from.
    """
    builder = _Builder(problem, ticks)
    builder.places()
    builder.symmetry()
    builder.moves()
    builder.times()
    if hint is not None:
        builder.hint(hint)
    return Program(builder.model, ticks, builder.decode)


class _Builder:
    """State while a program is built; every method adds what its name says."""

    def __init__(self, problem: LatencyProblem, ticks: Ticks) -> None:
        from ortools.sat.python import cp_model

        self.model = cp_model.CpModel()
        self.problem = problem
        self.ticks = ticks
        self.kind_of = problem.workload.kind_of
        self.units = range(problem.num_units)
        self.rank = {v: n for n, v in enumerate(_topological(problem))}
        self.at: dict[tuple[int, int], Linear] = {}
        self.fees: dict[int, list[Linear]] = defaultdict(list)

    def literal(self, unit: int, device: int) -> Linear:
        return self.at.get((unit, device), 0)

    def new_time(self, name: str) -> Linear:
        return self.model.new_int_var(0, self.ticks.horizon, name)

    def places(self) -> None:
        model, problem = self.model, self.problem
        for v in self.units:
            for d in (*problem.machines, *problem.hosts):
                if problem.times[v][self.kind_of[d]] is not None:
                    self.at[v, d] = model.new_bool_var(f"at[{v},{d}]")
            model.add_exactly_one(bit for _, bit in self._of(v))
        for first, *others in problem.tied:
            for v in others:
                for d in (*problem.machines, *problem.hosts):
                    model.add(self.literal(v, d) == self.literal(first, d))
        sizes, limits = self.ticks.memory()
        for d in (*problem.machines, *problem.hosts):
            limit = limits[self.kind_of[d]]
            if limit is not None:
                model.add(sum(sizes[v] * self.literal(v, d) for v in self.units) <= limit)

    def _of(self, unit: int) -> list[tuple[tuple[int, int], Linear]]:
        devices = (*self.problem.machines, *self.problem.hosts)
        return [((unit, d), self.at[unit, d]) for d in devices if (unit, d) in self.at]

    def symmetry(self) -> None:
        """Machines that are alike are opened in their order by units in a topological order."""
        for earlier, later in self._alike():
            opened: Linear = 0  # the earlier machine holds a unit of lower rank
            for v in sorted(self.units, key=self.rank.__getitem__):
                if (v, later) in self.at:
                    self.model.add(self.at[v, later] <= opened)
                if (v, earlier) in self.at:
                    now = self.model.new_bool_var(f"first[{v},{earlier}]")
                    self.model.add(now <= opened + self.at[v, earlier])
                    opened = now

    def _alike(self) -> list[tuple[int, int]]:
        by_kind: dict[int, list[int]] = defaultdict(list)
        for d in self.problem.machines:
            by_kind[self.kind_of[d]].append(d)
        return [pair for group in by_kind.values() for pair in zip(group, group[1:], strict=False)]

    def moves(self) -> None:
        self.follows: list[tuple[int, int, list[Linear]]] = []
        for number, net in enumerate(self.problem.nets):
            if any(net.fees[self.kind_of[d]] for d in self.problem.machines):
                self._move_out(number)
                for d in self.problem.machines:
                    self._move_in(number, d)

    def _move_out(self, number: int) -> None:
        net = self.problem.nets[number]
        for kind in sorted({self.kind_of[d] for d in self.problem.machines}):
            out = self.model.new_bool_var(f"out[{number}]")
            for d in self.problem.machines:
                if self.kind_of[d] == kind and (net.producer, d) in self.at:
                    for reader in net.readers:
                        made, read = self.at[net.producer, d], self.literal(reader, d)
                        self.model.add(out >= made - read)
            self.fees[net.producer].append(self.ticks.time(net.fees[kind]) * out)

    def _move_in(self, number: int, d: int) -> None:
        net = self.problem.nets[number]
        fee = self.ticks.time(net.fees[self.kind_of[d]])
        made_here = self.literal(net.producer, d)
        here = [reader for reader in net.readers if (reader, d) in self.at]
        pays = {r: self.model.new_bool_var(f"pay[{number},{r},{d}]") for r in here}
        for reader, pay in pays.items():
            self.fees[reader].append(fee * pay)
            self.model.add_implication(pay, self.at[reader, d])
            self.model.add(sum(pays.values()) >= self.at[reader, d] - made_here)
            self.follows.extend(
                (reader, other, [pay, self.at[other, d]]) for other in here if other != reader
            )
        if len(here) > 1:
            self.model.add_at_most_one(pays.values())

    def times(self) -> None:
        model, problem = self.model, self.problem
        longest = self.new_time("T")
        self.start = [self.new_time(f"start[{v}]") for v in self.units]
        self.end = [self.new_time(f"end[{v}]") for v in self.units]
        spans = []
        for v in self.units:
            busy = sum(
                self.ticks.time(problem.times[v][self.kind_of[d]] or 0.0) * bit
                for (_, d), bit in self._of(v)
            )
            span = self.new_time(f"span[{v}]")
            model.add(span == busy + sum(self.fees[v]))
            model.add(self.end[v] == self.start[v] + span)
            model.add(longest >= self.end[v])
            spans.append(span)
        for u, v in problem.edges:
            model.add(self.start[v] >= self.end[u])
        for payer, other, when in self.follows:
            model.add(self.start[other] >= self.end[payer]).only_enforce_if(when)
        for d in problem.machines:
            here = [v for v in self.units if (v, d) in self.at]
            model.add_no_overlap(
                model.new_optional_interval_var(
                    self.start[v], spans[v], self.end[v], self.at[v, d], f"run[{v},{d}]"
                )
                for v in here
            )
            work = sum(
                self.ticks.time(problem.times[v][self.kind_of[d]] or 0.0) * self.at[v, d]
                for v in here
            )
            model.add(longest >= work)
        model.minimize(longest)

    def hint(self, device_of: Sequence[int]) -> None:
        """Hint a placement, with machines that are alike renumbered as `symmetry` asks."""
        numbers: dict[int, int] = {}
        free: dict[int, list[int]] = defaultdict(list)
        for d in self.problem.machines:
            free[self.kind_of[d]].append(d)
        for v in sorted(self.units, key=self.rank.__getitem__):
            d = device_of[v]
            if d in self.problem.machines and d not in numbers:
                numbers[d] = free[self.kind_of[d]].pop(0)
        for (v, d), bit in self.at.items():
            self.model.add_hint(bit, numbers.get(device_of[v], device_of[v]) == d)

    def decode(self, value: Callable[[Linear], int]) -> Found:
        device = [next(d for (_, d), bit in self._of(v) if value(bit)) for v in self.units]
        order = sorted(
            self.units,
            key=lambda v: (value(self.start[v]), value(self.end[v]), self.rank[v]),
        )
        return Found(tuple(device), tuple(order))


def _topological(problem: LatencyProblem) -> list[int]:
    graph = nx.DiGraph()
    graph.add_nodes_from(range(problem.num_units))
    graph.add_edges_from(problem.edges)
    return list(nx.lexicographical_topological_sort(graph))
