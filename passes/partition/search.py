"""Search for the fastest legal partition, with a proof of how far from optimal it can be.

For every number of stages that could still win: dynamic programming over several topological
orders gives partitions (upper bounds) and, on chains, lower bounds; then the integer program is
asked for anything better than the best so far. *Infeasible* is the proof of optimality.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

from ...compiler.ir.cluster import Link
from .downsets import DownSets, all_down_sets, outlook, search_chains
from .ilp import SolveOutcome, build, solve
from .objective import step_seconds
from .orders import device_orders, devices_by_index, topological_orders
from .problem import Assignment, DeviceClass, StageProblem
from .windows import unit_windows

__all__ = ["SearchLimits", "Solution", "Tables", "estimate", "search", "simple_bound"]


_INSTANT = 1e-12  # seconds: a step takes at least this


@dataclass(frozen=True, slots=True)
class SearchLimits:
    """How hard to search.

    Args:
        tolerance: relative gap at which a partition counts as optimal.
        time_limit: deterministic seconds for all integer programs together.
        seed: of the solver and the random topological orders.
        num_orders: topological orders whose prefixes stand for too many down-sets.
        max_down_sets: down-sets, hence table rows, of the dynamic program.
        max_program: units x stages x classes above which device classes are fixed beforehand.
        max_work: arcs x down-sets^2 above which not every device sequence is enumerated.
        num_thresholds: bottlenecks that the dynamic program tries for each number of stages.
        confirm: units x stages up to which the integer program confirms a proof on a chain.
        accept: relative gap at which a larger program is not built.
    """

    tolerance: float = 1e-6
    time_limit: float = 30.0
    seed: int = 0
    num_orders: int = 8
    max_down_sets: int = 600
    max_program: int = 6000
    max_work: int = 10_000_000
    num_thresholds: int = 40
    confirm: int = 4000
    accept: float = 9e-3

    def margin(self, num_units: int, num_stages: int) -> float:
        """Relative gap that is not worth closing at this size."""
        small = num_units * num_stages <= self.confirm
        return self.tolerance if small else max(self.tolerance, self.accept)


@dataclass(frozen=True, slots=True)
class Solution:
    """The best partition, its step time, a bound on all others, and how both were found."""

    assignment: Assignment | None
    seconds: float
    lower_bound: float
    methods: tuple[str, ...]


@dataclass(slots=True)
class _Candidate:
    """One number of stages, with what is known about it."""

    num_stages: int
    lower_bound: float
    best: Assignment | None = None
    seconds: float = math.inf


@dataclass(frozen=True, slots=True)
class Tables:
    """Tables of the problem's down-sets, and the same for the problem on devices all alike."""

    real: DownSets
    relaxed: DownSets

    @staticmethod
    def of(problem: StageProblem, limits: SearchLimits) -> Tables:
        real = _down_sets(problem, limits)
        relaxed = _relaxed(problem)
        if relaxed is problem:
            return Tables(real, real)
        return Tables(real, DownSets(relaxed, real.sets, real.complete))

    def under(self, problem: StageProblem) -> Tables:
        """For `problem`, which may differ in the memory of its devices only."""
        return Tables(self.real.under(problem), self.relaxed.under(_relaxed(problem)))


def search(
    problem: StageProblem,
    stage_counts: tuple[int, ...],
    limits: SearchLimits,
    tables: Tables | None = None,
) -> Solution:
    """The fastest legal partition into one of `stage_counts` stages.

    `tables` of the same problem, at whatever memory, save making them again.
    """
    tables = tables.under(problem) if tables else Tables.of(problem, limits)
    candidates = _by_down_sets(tables, stage_counts, limits)
    best = min(candidates, key=lambda item: (item.seconds, item.num_stages))
    methods = ["dynamic programming over down-sets"]
    budget = limits.time_limit
    for candidate in sorted(candidates, key=lambda item: (item.lower_bound, item.num_stages)):
        small = len(problem.units) * candidate.num_stages <= limits.confirm
        margin = limits.margin(len(problem.units), candidate.num_stages)
        proven = candidate.lower_bound >= best.seconds * (1 - margin)
        if proven and not (candidate is best and small):
            continue
        outcome, least = _by_program(problem, candidate, best, budget, limits)
        methods = ["dynamic programming over down-sets", "integer program (CP-SAT)"]
        budget = max(budget - outcome.work, 0.05 * limits.time_limit)
        candidate.lower_bound = max(candidate.lower_bound, least)
        found = outcome.assignment
        if found is not None and (seconds := step_seconds(problem, found)) < candidate.seconds:
            candidate.best, candidate.seconds = found, seconds
            if seconds < best.seconds:
                best = candidate
    bound = min([item.lower_bound for item in candidates] + [best.seconds])
    return Solution(best.best, best.seconds, bound, tuple(methods))


def estimate(
    problem: StageProblem,
    stage_counts: tuple[int, ...],
    limits: SearchLimits,
    tables: Tables | None = None,
) -> Solution:
    """As `search`, by dynamic programming alone: quick, often optimal, not proven."""
    tables = tables.under(problem) if tables else Tables.of(problem, limits)
    candidates = _by_down_sets(tables, stage_counts, limits)
    best = min(candidates, key=lambda item: (item.seconds, item.num_stages))
    bound = min([item.lower_bound for item in candidates] + [best.seconds])
    return Solution(best.best, best.seconds, bound, ("dynamic programming over down-sets",))


def _by_down_sets(
    tables: Tables, stage_counts: tuple[int, ...], limits: SearchLimits
) -> list[_Candidate]:
    """Best partition of the down-sets for every stage count that may still win."""
    table, problem = tables.real, tables.real.problem
    bounds = outlook(tables.relaxed, max(stage_counts))
    candidates = [_Candidate(count, simple_bound(problem, count)) for count in stage_counts]
    if table.complete:
        for candidate in candidates:
            _raise_bound(problem, candidate, bounds[candidate.num_stages - 1])
    least = math.inf
    for candidate in sorted(
        candidates, key=lambda item: (bounds[item.num_stages - 1], -item.num_stages)
    ):
        margin = limits.margin(len(problem.units), candidate.num_stages)
        if bounds[candidate.num_stages - 1] < least * (1 - margin):
            _search_devices(table, candidate, least, limits)
            least = min(least, candidate.seconds)
    return candidates


def _down_sets(problem: StageProblem, limits: SearchLimits) -> DownSets:
    """All down-sets of the problem's DAG, or the prefixes of several topological orders."""
    count, edges = len(problem.units), problem.edges()
    every = all_down_sets(count, edges, limits.max_down_sets)
    if every is not None:
        return DownSets(problem, every, complete=True)
    found: dict[int, None] = {}
    for order in topological_orders(problem, count=limits.num_orders, seed=limits.seed):
        prefixes = list(itertools.accumulate((1 << unit for unit in order), initial=0))
        if found and len(found) + count > limits.max_down_sets:
            break
        found.update(dict.fromkeys(prefixes))
    sets = sorted(found, key=lambda bits: (bits.bit_count(), bits))
    return DownSets(problem, sets, complete=False)


def _search_devices(
    table: DownSets, candidate: _Candidate, least: float, limits: SearchLimits
) -> None:
    """Improve what is known of `candidate` by dynamic programming over down-sets."""
    problem = table.problem
    orders, complete = device_orders(
        problem, candidate.num_stages, max(limits.max_work // table.size**2, 1)
    )
    alike = len({link for row in problem.links for link in row}) == 1
    exact = complete and table.complete and (alike or table.flows_are_local())
    for number, devices in enumerate(orders):
        found = search_chains(
            table,
            candidate.num_stages,
            devices,
            cutoff=least,
            num_thresholds=limits.num_thresholds,
        )
        margin = 1 - limits.tolerance if number else 1.0  # by index unless others are better
        if found.seconds < candidate.seconds * margin:
            candidate.best, candidate.seconds = found.assignment, found.seconds
        if exact:
            _raise_bound(problem, candidate, found.lower_bound)


def _raise_bound(problem: StageProblem, candidate: _Candidate, bound: float) -> None:
    whole = bound + _update_seconds(problem, candidate.num_stages)
    candidate.lower_bound = max(candidate.lower_bound, whole)


def simple_bound(problem: StageProblem, num_stages: int) -> float:
    """Step time if work were divisible.

    Unit u takes at least rho_c times its least seconds on class c. With bottleneck B a device of
    class c takes at most B / rho_c of that work, so the total time is least when the fastest
    devices are filled first: piecewise linear in B, with its minimum where devices become full
    or at the heaviest unit.
    """
    work = [
        [f + b for f, b in zip(unit.forward_seconds, unit.backward_seconds, strict=True)]
        for unit in problem.units
    ]
    total = sum(map(min, work))
    if not 0.0 < total < math.inf:
        return 0.0 if total == 0.0 else math.inf
    pace_of = {
        kind: min(row[kind] / min(row) for row in work if min(row) > 0)
        for kind in sorted({entry.type for entry in problem.classes})
    }
    devices = [entry for entry in problem.classes for _ in entry.devices]
    paces = sorted(pace_of[entry.type] for entry in devices)[:num_stages]
    rates = list(itertools.accumulate(1 / pace for pace in paces))
    heaviest = max(map(min, work))
    bottlenecks = [heaviest, *(total / rate for rate in rates if rate > 0)]
    least = min(
        _fill(total, bottleneck, paces) + (problem.num_microbatches - 1) * bottleneck
        for bottleneck in bottlenecks
        if bottleneck >= heaviest
    )
    return least + _update_seconds(problem, num_stages)


def _fill(total: float, bottleneck: float, paces: list[float]) -> float:
    """Seconds of all work if each device, fastest first, works `bottleneck` seconds at most."""
    seconds, left = 0.0, total
    for pace in paces:
        share = min(left, bottleneck / pace)
        seconds += share * pace
        left -= share
    return seconds if left <= 1e-9 * total else math.inf


def _update_seconds(problem: StageProblem, num_stages: int) -> float:
    """Least seconds of update and exposed sums of the stage that has most of them.

    Of all sums, some are exposed at least; and a stage's backward hides no more than it takes.
    """
    units, count = problem.units, problem.num_microbatches
    updates = [min(unit.optimizer_seconds, default=0.0) for unit in units]
    summed = [unit.sum_seconds for unit in units]
    early = [unit.early_seconds for unit in units]
    share = problem.overlap.exposed
    least = [share * (a + count * b) for a, b in zip(summed, early, strict=True)]
    ends = [a + b for a, b in zip(updates, least, strict=True)]
    hiding = 0.0
    if any(summed) or any(early):
        hiding = problem.overlap.hidden * sum(max(unit.backward_seconds) for unit in units)
    once, each = (max(sum(table) - hiding, share * sum(table)) for table in (summed, early))
    late = sum(updates) + once + count * each
    return max(late / num_stages, max(ends))


def _relaxed(problem: StageProblem) -> StageProblem:
    """The problem on devices of one kind that are each as good as any, over the best link.

    The problem itself if its devices and links are all alike.
    """
    links = {link for row in problem.links for link in row}
    if len(problem.classes) == 1:
        return problem
    link = Link(
        min(entry.latency_seconds for entry in links), max(e.bytes_per_second for e in links)
    )
    units = tuple(
        replace(
            unit,
            forward_seconds=(min(unit.forward_seconds),),
            backward_seconds=(min(unit.backward_seconds),),
            optimizer_seconds=(min(unit.optimizer_seconds, default=0.0),),
            weight_seconds=(max(unit.weight_seconds, default=0.0),),
        )
        for unit in problem.units
    )
    shared = tuple(
        replace(
            item,
            forward_seconds=(min(item.forward_seconds),),
            optimizer_seconds=(min(item.optimizer_seconds, default=0.0),),
        )
        for item in problem.shared
    )
    devices = tuple(device for entry in problem.classes for device in entry.devices)
    memory = max(entry.memory_bytes for entry in problem.classes)
    return replace(
        problem,
        units=units,
        shared=shared,
        classes=(DeviceClass(0, memory, devices),),
        links=((link,),),
        class_pins=(),
    )


def _by_program(
    problem: StageProblem,
    candidate: _Candidate,
    best: _Candidate,
    time_limit: float,
    limits: SearchLimits,
) -> tuple[SolveOutcome, float]:
    """Ask for a partition into the candidate's stages that beats the best by the tolerance; what
    none of them is faster than, of which the question leaves out those that beat it by less, and
    which is nothing where it did not cover all device orders."""
    num_stages = candidate.num_stages
    cutoff = best.seconds * (1 - limits.tolerance)
    size = len(problem.units) * num_stages * len(problem.classes)
    decide = len(problem.classes) == 1 or size <= limits.max_program
    windows = unit_windows(problem, num_stages, _largest_bottleneck(problem, num_stages, cutoff))
    if windows is None:
        return SolveOutcome("infeasible", math.inf, None, 0.0), cutoff
    fixed = None
    if not decide:
        fixed = tuple(cls for _, cls in devices_by_index(problem)[:num_stages])
        if candidate.best is not None:
            fixed = candidate.best.classes
    program = build(
        problem,
        num_stages,
        windows,
        scale_seconds=max(best.seconds, _INSTANT) if best.best else _loose_seconds(problem),
        cutoff_seconds=cutoff,
        fixed_classes=fixed,
    )
    hint = candidate.best if candidate.best is not None else None
    outcome = solve(program, hint=hint, time_limit=time_limit, seed=limits.seed)
    return outcome, min(outcome.bound_seconds, cutoff) if decide else 0.0


def _loose_seconds(problem: StageProblem) -> float:
    """An upper estimate of any partition's step time."""
    units = [s for u in problem.units for s in (*u.forward_seconds, *u.backward_seconds)]
    recomputed = [s for item in problem.shared for s in item.forward_seconds]
    total = sum(s for s in units if s < math.inf)
    total += problem.num_devices * sum(s for s in recomputed if s < math.inf)
    return max(total * (problem.num_microbatches + 1), _INSTANT)


def _largest_bottleneck(problem: StageProblem, num_stages: int, cutoff: float) -> float:
    """A bottleneck above which the step takes longer than `cutoff`."""
    if math.isinf(cutoff):
        return math.inf
    repeats = problem.num_microbatches - 1
    others = simple_bound(replace(problem, num_microbatches=1), num_stages)
    return (cutoff - others) / repeats if repeats else cutoff
