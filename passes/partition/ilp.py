"""The stage problem as an integer linear program, for CP-SAT: build, solve, decode.

For S stages, units v, edges u -> v, device classes c:

    y[v,s] in {0,1}     v is in stage <= s;  y[v,s-1] <= y[v,s], y[v,s] <= y[u,s]   `_prefixes`
    x[v,s] = y[v,s] - y[v,s-1]; sum_v x[v,s] >= 1; windows fix x outside            `_prefixes`
    z[s,c] in {0,1}     stage s runs on class c: sum_c z = 1, sum_s z <= count       `_classes`
    w[v,s,c]            x[v,s] and z[s,c]: sum_c w[v,s,c] = x[v,s], w <= z           `_members`
    r[p,s] >= x[v,s]    stage s holds what its units share (parameter, mask)         `_members`
    k[f,s] >= x[v,s] - x[u,s]   value f of u comes into stage s for its consumer v   `_crossings`
    o[f,s] >= x[u,s] - x[v,s]   value f of u leaves stage s for its consumer v       `_crossings`
    h[f,s,l]            it comes over a link l that is slower than the fastest one   `_slow_links`
    T[s], R[s], G[s]    compute, receive and return seconds, linear in w, r, k, h    `_times`
    H[s]                seconds for which messages hold it up, linear in k, o        `_held_up`
    B >= T[s] + H[s], R[s], G[s];  O >= optimizer seconds of every stage, with the least    `_times`
                        exposed part of its sums; with all that backward cannot hide
    static + in_flight saved + transient + messages <= memory                        `_memory`
    static + temporaries of the optimizer + messages <= memory                       `_memory`
    minimise sum T + (m - 1) B + sum (R + G) + O + sync                              `_objective`

Prefix variables are those of DESIGN 4.3: they make precedence a set of two-variable inequalities
and remove the symmetry of stages. A unit's window follows from the work of its ancestors and
descendants: under a cutoff on the step time the bottleneck is at most B_max, and stages 0 .. s
hold at most (s + 1) B_max of work (`windows.py`). Seconds are rounded down to ticks of 1e-8 of
the cutoff, so the program's optimum never exceeds the true one; bytes are exact.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...compiler.ir.cluster import Link
from ..interrupts import solve_interruptibly
from .objective import held_seconds, sync_seconds, transfer
from .problem import Assignment, Flow, Shared, StageProblem, Unit

__all__ = ["StageProgramModel", "SolveOutcome", "build", "decode", "solve"]

_TICKS = 1 << 27  # ticks in the cutoff (or in the scale, without one)
_WORK_PER_SECOND = 0.25  # the solver's deterministic time in a second, on these programs
Linear = Any  # an OR-Tools linear expression, or an int


@dataclass(frozen=True, slots=True)
class SolveOutcome:
    """Result of one solve.

    Args:
        status: `optimal`, `feasible`, `infeasible` or `unknown`.
        bound_seconds: no partition that the program describes is faster; infinite if infeasible.
        assignment: the best partition found.
        work: deterministic time that the solver spent, in about seconds.
    """

    status: str
    bound_seconds: float
    assignment: Assignment | None
    work: float


@dataclass(frozen=True, slots=True)
class StageProgramModel:
    """A built program and its variables, by name of the module docstring."""

    model: Any
    problem: StageProblem
    num_stages: int
    ticks_per_second: float
    y: dict[tuple[int, int], Linear]
    z: dict[tuple[int, int], Linear]


@dataclass(frozen=True, slots=True)
class _Held:
    """A 0/1 expression: a stage holds `item`, on a device of type `kind`."""

    chosen: Linear
    item: Unit | Shared
    kind: int


class _Builder:
    """State while a program is built; every method adds what its name says."""

    def __init__(
        self,
        problem: StageProblem,
        num_stages: int,
        windows: Sequence[tuple[int, int]],
        fixed: tuple[int, ...] | None,
        ticks_per_second: float,
    ) -> None:
        from ortools.sat.python import cp_model

        self.model = cp_model.CpModel()
        self.problem = problem
        self.num_stages = num_stages
        self.stages = range(num_stages)
        self.units = range(len(problem.units))
        self.windows = windows
        self.fixed = fixed
        self.scale = ticks_per_second
        self.horizon = 1 << 40
        self.y: dict[tuple[int, int], Linear] = {}
        self.x: dict[tuple[int, int], Linear] = {}
        self.z: dict[tuple[int, int], Linear] = {}
        self.w: dict[tuple[int, int, int], Linear] = {}
        self.r: dict[tuple[int, int], list[Linear]] = defaultdict(list)
        self.held: list[list[_Held]] = [[] for _ in self.stages]
        self.k: list[list[tuple[int, Linear]]] = [[] for _ in self.stages]
        self.o: list[list[tuple[int, Linear]]] = [[] for _ in self.stages]
        self.h: list[list[tuple[int, Link, Linear]]] = [[] for _ in self.stages]
        self.links = tuple(dict.fromkeys(link for row in problem.links for link in row))
        self.flow_ticks = [
            {link: self._flow_ticks(flow, link) for link in self.links} for flow in problem.flows
        ]
        self.least_ticks = [
            tuple(min(ways) for ways in zip(*table.values(), strict=True))
            for table in self.flow_ticks
        ]

    def ticks(self, seconds: float) -> int:
        return math.floor(seconds * self.scale)

    def options(self, stage: int) -> Sequence[int]:
        """Classes that stage may run on."""
        return range(len(self.problem.classes)) if self.fixed is None else (self.fixed[stage],)

    def prefixes(self) -> None:
        for unit in self.units:
            first, last = self.windows[unit]
            for stage in range(-1, self.num_stages):
                if stage < first:
                    self.y[unit, stage] = 0
                elif stage >= last:
                    self.y[unit, stage] = 1
                else:
                    self.y[unit, stage] = self.model.new_bool_var(f"y[{unit},{stage}]")
            for stage in self.stages:
                self.x[unit, stage] = self.y[unit, stage] - self.y[unit, stage - 1]
                if first <= stage <= last and stage > first:
                    self.model.add(self.y[unit, stage - 1] <= self.y[unit, stage])
        for source, target in self.problem.edges():
            for stage in self.stages:
                if not (_is(self.y[target, stage], 0) or _is(self.y[source, stage], 1)):
                    self.model.add(self.y[target, stage] <= self.y[source, stage])
        for stage in self.stages:
            self.model.add(sum(self.x[unit, stage] for unit in self.units) >= 1)

    def within(self, unit: int, stage: int) -> bool:
        return self.windows[unit][0] <= stage <= self.windows[unit][1]

    def classes(self) -> None:
        for stage in self.stages:
            options = self.options(stage)
            for cls in options:
                single = len(options) == 1
                self.z[stage, cls] = 1 if single else self.model.new_bool_var(f"z[{stage},{cls}]")
            if len(options) > 1:
                self.model.add_exactly_one(self.z[stage, cls] for cls in options)
        if self.fixed is None and len(self.problem.classes) > 1:
            for cls, entry in enumerate(self.problem.classes):
                used = sum(self.z[stage, cls] for stage in self.stages)
                self.model.add(used <= len(entry.devices))

    def members(self) -> None:
        for unit in self.units:
            for stage in self.stages:
                if self.within(unit, stage):
                    self._member(unit, stage)
        for cls_unit, cls in self.problem.class_pins:
            for stage in self.stages:
                if self.within(cls_unit, stage):
                    allowed = self.w.get((cls_unit, stage, cls), 0)
                    self.model.add(self.x[cls_unit, stage] == allowed)
        for number, shared in enumerate(self.problem.shared):
            for stage in self.stages:
                users = [user for user in shared.users if self.within(user, stage)]
                for cls in self.options(stage) if users else ():
                    held = self.model.new_bool_var(f"r[{number},{stage},{cls}]")
                    self.r[number, cls].append(held)
                    self.held[stage].append(_Held(held, shared, self.problem.classes[cls].type))
                    for user in users:
                        self.model.add(held >= self.w[user, stage, cls])
                    if math.isinf(shared.forward_seconds[self.problem.classes[cls].type]):
                        self.model.add(held == 0)

    def _member(self, unit: int, stage: int) -> None:
        options = self.options(stage)
        if len(options) == 1:
            self.w[unit, stage, options[0]] = self.x[unit, stage]
        else:
            for cls in options:
                chosen = self.model.new_bool_var(f"w[{unit},{stage},{cls}]")
                self.w[unit, stage, cls] = chosen
                self.model.add(chosen <= self.z[stage, cls])
            whole = sum(self.w[unit, stage, cls] for cls in options)
            self.model.add(whole == self.x[unit, stage])
        for cls in options:
            entry = self.problem.classes[cls]
            item = self.problem.units[unit]
            self.held[stage].append(_Held(self.w[unit, stage, cls], item, entry.type))
            if math.isinf(item.forward_seconds[entry.type]):
                self.model.add(self.w[unit, stage, cls] == 0)

    def crossings(self) -> None:
        for number, flow in enumerate(self.problem.flows):
            for stage in range(1, self.num_stages):
                users = [u for u in flow.consumers if u != flow.producer and self.within(u, stage)]
                if not users or self.windows[flow.producer][0] >= stage:
                    continue
                crosses = self.model.new_bool_var(f"k[{number},{stage}]")
                self.k[stage].append((number, crosses))
                for user in users:
                    present = self.x[flow.producer, stage]
                    self.model.add(crosses >= self.x[user, stage] - present)
                self._slow_links(number, stage, crosses)
            self._leave(number)

    def _leave(self, number: int) -> None:
        flow = self.problem.flows[number]
        for stage in range(self.num_stages - 1):
            users = [u for u in flow.consumers if self.windows[u][1] > stage]
            if users and self.within(flow.producer, stage):
                leaves = self.model.new_bool_var(f"o[{number},{stage}]")
                self.o[stage].append((number, leaves))
                for user in users:
                    self.model.add(leaves >= self.x[flow.producer, stage] - self.x[user, stage])

    def _slow_links(self, number: int, stage: int, crosses: Linear) -> None:
        """h[f,s,l] for every link of the cluster over which f is slower than over the fastest."""
        flow = self.problem.flows[number]
        for position, link in enumerate(self.links):
            if self.flow_ticks[number][link] == self.least_ticks[number]:
                continue
            pairs = [
                (sent, target)
                for target in self.options(stage)
                for origin, sent in self._origins(flow.producer, stage)
                if self.problem.links[origin][target] == link
            ]
            if pairs:
                slow = self.model.new_bool_var(f"h[{number},{stage},{position}]")
                self.h[stage].append((number, link, slow))
                for sent, target in pairs:
                    self.model.add(slow >= crosses + sent + self.z[stage, target] - 2)

    def _origins(self, unit: int, stage: int) -> list[tuple[int, Linear]]:
        """For each class, whether `unit` is on it in a stage before `stage`."""
        first, last = self.windows[unit]
        found: dict[int, Linear] = {}
        for earlier in range(first, min(last + 1, stage)):
            for cls in self.options(earlier):
                found[cls] = found.get(cls, 0) + self.w[unit, earlier, cls]
        return list(found.items())

    def _flow_ticks(self, flow: Flow, link: Link) -> tuple[int, ...]:
        ways = (flow.forward_bytes, flow.gradient_bytes)
        return tuple(self.ticks(transfer(link, num_bytes)) for num_bytes in ways)

    def times(self) -> tuple[list[Linear], list[Linear], Linear, Linear]:
        """T[s], R[s] + G[s], B and O."""
        compute = [self._compute(stage) for stage in self.stages]
        bottleneck = self.model.new_int_var(0, self.horizon, "B")
        exposed = []
        for stage in self.stages:
            ways = [self._communication(stage, way) for way in (0, 1)]
            exposed.append(sum(ways))
            for part in (compute[stage] + self._held_up(stage), *ways):
                self.model.add(bottleneck >= part)
        self.model.add(self.num_stages * bottleneck >= sum(compute))
        updates = self.model.new_int_var(0, self.horizon, "O")
        for stage in self.stages:
            self.model.add(updates >= self._updates(stage))
            if any(held.item.sum_seconds for held in self.held[stage]):
                self.model.add(updates >= self._late_sums(stage, early=False))
            if any(held.item.early_seconds for held in self.held[stage]):
                self.model.add(updates >= self._late_sums(stage, early=True))
        return compute, exposed, bottleneck, updates

    def _compute(self, stage: int) -> Linear:
        terms = []
        for held in self.held[stage]:
            seconds = held.item.forward_seconds[held.kind]
            if isinstance(held.item, Unit):
                seconds += held.item.backward_seconds[held.kind]
            terms.append((0 if math.isinf(seconds) else self.ticks(seconds)) * held.chosen)
        return sum(terms)

    def _held_up(self, stage: int) -> Linear:
        """What messages hold a stage up for."""
        seconds = [held_seconds(self.problem, flow) for flow in self.problem.flows]
        through = (*self.k[stage], *self.o[stage])
        return sum(self.ticks(seconds[number]) * bit for number, bit in through if seconds[number])

    def _updates(self, stage: int) -> Linear:
        share = self.problem.overlap.exposed
        return sum(
            self.ticks(_update_seconds(held) + share * sum(self._sums(held))) * held.chosen
            for held in self.held[stage]
        )

    def _sums(self, held: _Held) -> tuple[float, float]:
        """Seconds of sums of gradients that are made once a step, and of a step's others."""
        item = held.item
        return item.sum_seconds, self.problem.num_microbatches * item.early_seconds

    def _late_sums(self, stage: int, *, early: bool) -> Linear:
        """Optimizer and sums of gradients, less what those made once a step, or once a microbatch
        (`early`), may be hidden behind; of the others what is exposed at least."""
        total: Linear = 0
        overlap = self.problem.overlap
        rounds = overlap.hidden * (self.problem.num_microbatches if early else 1)
        for held in self.held[stage]:
            hiding: tuple[float, ...] = ()
            if isinstance(held.item, Unit):
                hiding = held.item.weight_seconds if stage else held.item.backward_seconds
            late, others = self._sums(held)[::-1] if early else self._sums(held)
            ticks = self.ticks(_update_seconds(held) + late + overlap.exposed * others)
            ticks -= self.ticks(rounds * hiding[held.kind]) + 1 if hiding else 0
            total += ticks * held.chosen
        return total

    def _communication(self, stage: int, way: int) -> Linear:
        total = sum(self.least_ticks[number][way] * crosses for number, crosses in self.k[stage])
        return total + sum(
            (self.flow_ticks[number][link][way] - self.least_ticks[number][way]) * slow
            for number, link, slow in self.h[stage]
        )

    def memory(self) -> None:
        for stage in self.stages:
            in_flight = self.problem.in_flight(self.num_stages, stage)
            limit = sum(
                self.problem.classes[cls].memory_bytes * self.z[stage, cls]
                for cls in self.options(stage)
            )
            held = self.held[stage]
            always = sum(entry.item.static_bytes * entry.chosen for entry in held)
            always += self._messages(stage, in_flight)
            saved = sum(in_flight * entry.item.saved_bytes * entry.chosen for entry in held)
            transients = [(entry.item.transient_bytes, entry.chosen) for entry in held]
            peak = self._largest(f"transient[{stage}]", transients)
            self.model.add(always + saved + peak <= limit)
            if any(entry.item.update_bytes for entry in held):
                update = sum(entry.item.update_bytes * entry.chosen for entry in held)
                self.model.add(always + update <= limit)
            peaks = [(entry.item.update_peak_bytes, entry.chosen) for entry in held]
            if any(size for size, _ in peaks):
                self.model.add(always + self._largest(f"update[{stage}]", peaks) <= limit)

    def _messages(self, stage: int, in_flight: int) -> Linear:
        flows = self.problem.flows
        incoming = sum(flows[f].incoming_bytes(in_flight) * bit for f, bit in self.k[stage])
        return incoming + sum(flows[f].outgoing_bytes(in_flight) * bit for f, bit in self.o[stage])

    def _largest(self, name: str, sizes: list[tuple[int, Linear]]) -> Linear:
        """A variable that is at least every size whose 0/1 expression is 1."""
        largest = max((size for size, _ in sizes), default=0)
        if not largest:
            return 0
        peak = self.model.new_int_var(0, largest, name)
        for size, chosen in sizes:
            if size:
                self.model.add(peak >= size * chosen)
        return peak

    def sync(self) -> Linear:
        """Seconds of reducing tied gradients: a step for each further stage that holds a copy."""
        total: Linear = 0
        for number, shared in enumerate(self.problem.shared):
            if not shared.reduced_bytes:
                continue
            held = [
                bit
                for cls in range(len(self.problem.classes))
                for bit in self.r.get((number, cls), ())
            ]
            for copies in range(2, min(len(shared.users), self.num_stages) + 1):
                further = self.model.new_bool_var(f"copies[{number},{copies}]")
                self.model.add(sum(held) - (copies - 1) <= self.num_stages * further)
                step = sync_seconds(self.problem, shared, copies)
                step -= sync_seconds(self.problem, shared, copies - 1)
                total += self.ticks(step) * further
        return total


def _update_seconds(held: _Held) -> float:
    return held.item.optimizer_seconds[held.kind] if held.item.optimizer_seconds else 0.0


def _is(expression: Linear, constant: int) -> bool:
    return isinstance(expression, int) and expression == constant


def build(
    problem: StageProblem,
    num_stages: int,
    windows: Sequence[tuple[int, int]],
    *,
    scale_seconds: float,
    cutoff_seconds: float = math.inf,
    fixed_classes: tuple[int, ...] | None = None,
) -> StageProgramModel:
    """The program for exactly `num_stages` stages.

    Args:
        windows: first and last stage of every unit.
        scale_seconds: an upper estimate of the step time, which sets the resolution.
        cutoff_seconds: only partitions at least this fast are of interest.
        fixed_classes: the class of every stage, or None to decide it.
    """
    builder = _Builder(problem, num_stages, windows, fixed_classes, _TICKS / scale_seconds)
    builder.prefixes()
    builder.classes()
    builder.members()
    builder.crossings()
    compute, exposed, bottleneck, updates = builder.times()
    builder.memory()
    total = sum(compute) + sum(exposed) + updates + builder.sync()
    total += (problem.num_microbatches - 1) * bottleneck
    if cutoff_seconds < math.inf:
        builder.model.add(total <= builder.ticks(cutoff_seconds))
    builder.model.minimize(total)
    return StageProgramModel(
        builder.model, problem, num_stages, builder.scale, builder.y, builder.z
    )


def solve(
    program: StageProgramModel, *, hint: Assignment | None, time_limit: float, seed: int
) -> SolveOutcome:
    """Solve with one worker, a fixed seed and a deterministic time limit (about seconds)."""
    from ortools.sat.python import cp_model

    if hint is not None:
        for (unit, stage), variable in program.y.items():
            if not isinstance(variable, int):
                program.model.add_hint(variable, int(hint.stages[unit] <= stage))
        for (stage, cls), variable in program.z.items():
            if not isinstance(variable, int):
                program.model.add_hint(variable, int(hint.classes[stage] == cls))
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.random_seed = seed
    solver.parameters.max_deterministic_time = time_limit * _WORK_PER_SECOND
    status = solve_interruptibly(solver, program.model)
    work = float(solver.response_proto.deterministic_time) / _WORK_PER_SECOND
    if status == cp_model.INFEASIBLE:
        return SolveOutcome("infeasible", math.inf, None, work)
    bound = solver.best_objective_bound / program.ticks_per_second
    if status in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        name = "optimal" if status == cp_model.OPTIMAL else "feasible"
        return SolveOutcome(name, bound, decode(program, solver), work)
    assert status == cp_model.UNKNOWN, solver.status_name(status)
    return SolveOutcome("unknown", bound, None, work)


def decode(program: StageProgramModel, solver: Any) -> Assignment:
    """The partition in a solved program."""

    def value(variable: Linear) -> int:
        return variable if isinstance(variable, int) else int(solver.value(variable))

    stages = tuple(
        next(stage for stage in range(program.num_stages) if value(program.y[unit, stage]))
        for unit in range(len(program.problem.units))
    )
    classes = tuple(
        next(cls for (place, cls), bit in program.z.items() if place == stage and value(bit))
        for stage in range(program.num_stages)
    )
    return Assignment(stages, classes)
