"""Placement for latency with one piece a machine, as an integer program for CP-SAT.

The pieces and the units on hosts can be run through in some order, so number the pieces (*slots*
0 .. K-1) in that order and give each unit a *level*: 2k + 1 in slot k, 2k on a host after slot k-1
and before slot k. Levels never fall along an edge, and levels that never fall along an edge give
pieces that do not wait for each other: acyclicity costs nothing else, and machines that are alike
have no symmetry left. For units v, edges u -> v, nets n = (producer u, readers):

    y[v,l] in {0,1}    level of v <= l;  y[v,l] <= y[v,l+1], y[v,l] <= y[u,l]          `_levels`
    on[v,k] = y[v,2k+1] - y[v,2k];  host[v,h];  sum on + sum host = 1                  `_sites`
    z[k,c] in {0,1}    slot k runs on a machine of kind c, each kind count times       `_kinds`
    sum over v of size on[v,k] <= memory of the kind                                   `_memory`
    in[n,k]  >= on[r,k] - on[u,k]   slot k moves net n in, for a reader r              `_crossings`
    out[n,k] >= on[u,k] - on[r,k]   slot k moves net n out, for a reader r             `_crossings`
    S[k] >= R[u] if in[n,k];  F[k] >= S[k] + times + fees of slot k                    `_times`
    R[v] >= F[k] if on[v,k];  R[v] >= R[u] + time if host[v,h];  T >= R, F             `_times`
    p[v] >= p[u] + time of v + fees of what u -> v crosses;  p[v] <= R[v]              `_paths`
    minimise T

The potentials p, which follow from the rest, count what lies on a path only; they need no big
constants, so that the linear relaxation bounds T by the longest path from the start.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .latency_problem import LatencyProblem, Net, machine_order
from .latency_ticks import Found, Linear, Program, Ticks

__all__ = ["build_contiguous"]


def build_contiguous(
    problem: LatencyProblem, ticks: Ticks, hint: Sequence[int] | None = None
) -> Program:
    """The program for placements of at most the horizon's value.

    Args:
        hint: the device of every unit in a contiguous placement to start from.
    """
    builder = _Builder(problem, ticks)
    builder.levels()
    builder.sites()
    builder.kinds()
    builder.memory()
    builder.crossings()
    builder.times()
    builder.paths()
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
        self.units = range(problem.num_units)
        kind_of = problem.workload.kind_of
        self.machine_kinds = sorted({kind_of[d] for d in problem.machines})
        self.count = {k: sum(kind_of[d] == k for d in problem.machines) for k in self.machine_kinds}
        self.slots = range(min(len(problem.machines), problem.num_units))
        self.last = 2 * len(self.slots)
        self.y: dict[tuple[int, int], Linear] = {}
        self.on: dict[tuple[int, int], Linear] = {}
        self.host: dict[tuple[int, int], Linear] = {}
        self.z: dict[tuple[int, int], Linear] = {}
        self.enter: dict[tuple[int, int], Linear] = {}
        self.leave: dict[tuple[int, int], Linear] = {}
        self.longest = self.new_time("T")

    def new_time(self, name: str) -> Linear:
        return self.model.new_int_var(0, self.ticks.horizon, name)

    def levels(self) -> None:
        model = self.model
        for v in self.units:
            for level in range(self.last):
                self.y[v, level] = model.new_bool_var(f"y[{v},{level}]")
                if level:
                    model.add_implication(self.y[v, level - 1], self.y[v, level])
            self.y[v, self.last] = 1
        for u, v in self.problem.edges:
            for level in range(self.last):
                model.add_implication(self.y[v, level], self.y[u, level])

    def sites(self) -> None:
        model, problem = self.model, self.problem
        kind_of = problem.workload.kind_of
        for v in self.units:
            for k in self.slots:
                self.on[v, k] = model.new_bool_var(f"on[{v},{k}]")
                model.add(self.on[v, k] == self.y[v, 2 * k + 1] - self.y[v, 2 * k])
            for h in problem.hosts:
                if problem.times[v][kind_of[h]] is not None:
                    self.host[v, h] = model.new_bool_var(f"host[{v},{h}]")
            if all(problem.times[v][kind] is None for kind in self.machine_kinds):
                model.add(sum(self.on[v, k] for k in self.slots) == 0)
            model.add_exactly_one(
                [self.on[v, k] for k in self.slots]
                + [self.host[v, h] for h in problem.hosts if (v, h) in self.host]
            )
        for first, *others in problem.tied:
            for v in others:
                for k in self.slots:
                    model.add(self.on[v, k] == self.on[first, k])
                for h in problem.hosts:
                    model.add(self.host.get((v, h), 0) == self.host.get((first, h), 0))

    def kinds(self) -> None:
        """Which kind every slot is; slots without units come last where machines are alike."""
        model = self.model
        single = len(self.machine_kinds) == 1
        for k in self.slots:
            for kind in self.machine_kinds:
                self.z[k, kind] = 1 if single else model.new_bool_var(f"z[{k},{kind}]")
        if single:
            self._used_first()
            return
        for k in self.slots:
            model.add_exactly_one(self.z[k, kind] for kind in self.machine_kinds)
        for kind in self.machine_kinds:
            model.add(sum(self.z[k, kind] for k in self.slots) <= self.count[kind])
        for v in self.units:
            for kind in self.machine_kinds:
                if self.problem.times[v][kind] is None:
                    for k in self.slots:
                        model.add_implication(self.on[v, k], self.z[k, kind].Not())

    def _used_first(self) -> None:
        used = [self.model.new_bool_var(f"used[{k}]") for k in self.slots]
        for k in self.slots:
            self.model.add_max_equality(used[k], [self.on[v, k] for v in self.units])
            if k:
                self.model.add_implication(used[k], used[k - 1])

    def when(self, constraint: Any, slot: int, kind: int) -> None:
        """The constraint holds where the slot is of the kind."""
        if len(self.machine_kinds) > 1:
            constraint.only_enforce_if(self.z[slot, kind])

    def memory(self) -> None:
        sizes, limits = self.ticks.memory()
        for k in self.slots:
            held = sum(sizes[v] * self.on[v, k] for v in self.units)
            for kind in self.machine_kinds:
                limit = limits[kind]
                if limit is not None:
                    self.when(self.model.add(held <= limit), k, kind)
        for h in self.problem.hosts:
            limit = limits[self.problem.workload.kind_of[h]]
            if limit is not None:
                held = sum(sizes[v] * self.host.get((v, h), 0) for v in self.units)
                self.model.add(held <= limit)

    def crossings(self) -> None:
        model = self.model
        for number, net in enumerate(self.problem.nets):
            for k in self.slots:
                enter = self.enter[number, k] = model.new_bool_var(f"in[{number},{k}]")
                leave = self.leave[number, k] = model.new_bool_var(f"out[{number},{k}]")
                made_here = self.on[net.producer, k]
                model.add_implication(enter, made_here.Not())
                model.add_implication(leave, made_here)
                for reader in net.readers:
                    read_here = self.on[reader, k]
                    model.add_bool_or(read_here.Not(), made_here, enter)
                    model.add_bool_or(made_here.Not(), read_here, leave)

    def times(self) -> None:
        model = self.model
        self.ready = [self.new_time(f"R[{v}]") for v in self.units]
        start = [self.new_time(f"S[{k}]") for k in self.slots]
        finish = [self.new_time(f"F[{k}]") for k in self.slots]
        for k in self.slots:
            for kind in self.machine_kinds:
                busy = self._busy(k, kind)
                self.when(model.add(finish[k] >= start[k] + busy), k, kind)
            model.add(self.longest >= finish[k])
            for number, net in enumerate(self.problem.nets):
                waits = model.add(start[k] >= self.ready[net.producer])
                waits.only_enforce_if(self.enter[number, k])
            for v in self.units:
                model.add(self.ready[v] >= finish[k]).only_enforce_if(self.on[v, k])
        for v in self.units:
            model.add(self.longest >= self.ready[v])
            model.add(self.ready[v] >= self._on_hosts(v))
        for u, v in self.problem.edges:
            model.add(self.ready[v] >= self.ready[u] + self._on_hosts(v))
        model.minimize(self.longest)

    def _busy(self, k: int, kind: int) -> Linear:
        times = self.problem.times
        compute = sum(
            self.ticks.time(time) * self.on[v, k]
            for v in self.units
            if (time := times[v][kind]) is not None
        )
        moving = sum(
            self.ticks.time(net.fees[kind]) * (self.enter[number, k] + self.leave[number, k])
            for number, net in enumerate(self.problem.nets)
        )
        return compute + moving

    def _on_hosts(self, v: int) -> Linear:
        kind_of = self.problem.workload.kind_of
        return sum(
            self.ticks.time(self.problem.times[v][kind_of[h]] or 0.0) * self.host[v, h]
            for h in self.problem.hosts
            if (v, h) in self.host
        )

    def paths(self) -> None:
        model = self.model
        potential = [self.new_time(f"p[{v}]") for v in self.units]
        time = [self._least_time(v) for v in self.units]
        for v in self.units:
            model.add(potential[v] >= time[v])
            model.add(potential[v] <= self.ready[v])
        for number, net in enumerate(self.problem.nets):
            fee = self.ticks.time(min(net.fees[kind] for kind in self.machine_kinds or (0,)))
            for reader in net.readers:
                crossed = self._crossed(number, net, reader) if fee and self.slots else 0
                model.add(
                    potential[reader] >= potential[net.producer] + time[reader] + fee * crossed
                )

    def _least_time(self, v: int) -> Linear:
        times = [t for kind in self.machine_kinds if (t := self.problem.times[v][kind]) is not None]
        if not times:
            return self._on_hosts(v)
        on_machines = sum(self.on[v, k] for k in self.slots)
        return self._on_hosts(v) + self.ticks.time(min(times)) * on_machines

    def _crossed(self, number: int, net: Net, reader: int) -> Linear:
        """How often the net's fee is paid on the way to a reader: moved out, moved in."""
        out = self.model.new_bool_var(f"out[{number}] to {reader}")
        into = self.model.new_bool_var(f"in[{number}] to {reader}")
        for k in self.slots:
            self.model.add_bool_or(self.on[net.producer, k].Not(), self.on[reader, k], out)
            self.model.add_bool_or(self.on[reader, k].Not(), self.on[net.producer, k], into)
        return out + into

    def hint(self, device_of: Sequence[int]) -> None:
        slots = machine_order(self.problem, device_of)
        assert slots is not None, "the hint is not contiguous"
        slot_of = {device: k for k, device in enumerate(slots)}
        kind_of = self.problem.workload.kind_of
        level = self._hinted_levels(device_of, slot_of)
        for v in self.units:
            for one in range(self.last):
                self.model.add_hint(self.y[v, one], level[v] <= one)
            for k in self.slots:
                self.model.add_hint(self.on[v, k], slot_of.get(device_of[v], -1) == k)
            for h in self.problem.hosts:
                if (v, h) in self.host:
                    self.model.add_hint(self.host[v, h], device_of[v] == h)
        if len(self.machine_kinds) > 1:
            for k in self.slots:
                for kind in self.machine_kinds:
                    self.model.add_hint(self.z[k, kind], kind_of[slots[k]] == kind)

    def _hinted_levels(self, device_of: Sequence[int], slot_of: dict[int, int]) -> list[int]:
        """Levels of all units: those on hosts directly behind the last slot they follow."""
        level = [0] * self.problem.num_units
        before: list[list[int]] = [[] for _ in self.units]
        after: list[list[int]] = [[] for _ in self.units]
        for u, v in self.problem.edges:
            before[v].append(u)
            after[u].append(v)
        waiting = [len(one) for one in before]
        ready = [v for v in self.units if not waiting[v]]
        for v in ready:
            slot = slot_of.get(device_of[v])
            if slot is None:
                behind = max((level[u] for u in before[v]), default=0)
                level[v] = behind + behind % 2
            else:
                level[v] = 2 * slot + 1
            for other in after[v]:
                waiting[other] -= 1
                if not waiting[other]:
                    ready.append(other)
        return level

    def decode(self, value: Callable[[Linear], int]) -> Found:
        kind_of = self.problem.workload.kind_of
        left = {
            kind: [d for d in self.problem.machines if kind_of[d] == kind]
            for kind in self.machine_kinds
        }
        device = [
            next(left[kind].pop(0) for kind in self.machine_kinds if value(self.z[k, kind]))
            for k in self.slots
        ]

        def site(v: int) -> int:
            for k in self.slots:
                if value(self.on[v, k]):
                    return device[k]
            return next(
                h for h in self.problem.hosts if (v, h) in self.host and value(self.host[v, h])
            )

        return Found(tuple(map(site, self.units)))
