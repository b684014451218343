"""Baselines of operator placement: what simple methods give, for either objective.

*Greedy* fills one device after another along a topological order: for latency each machine up to
its memory, as the baseline of Tarnawski et al. (NeurIPS 2020) does; for throughput each device up
to the least load with which everything is placed. *Interval DP* cuts one topological order into the
best intervals. *Local search* starts from the better of both and moves single units. *Balanced cut*
is that of a library (`balanced_cut`). Bounds are those of work and paths.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from ...compiler.ir.errors import InfeasibleError, UsageError
from ...compiler.ir.workload import Workload
from ...cost_models.placement import contiguity_breaks
from .anneal import anneal, anneal_pieces
from .balanced_cut import balanced_cut
from .feasibility import require_feasible
from .filling import filled
from .incumbent import Incumbent, Progress
from .intervals import Pieces, best_pieces
from .latency_bounds import latency_bound
from .latency_incumbent import LatencyIncumbent
from .latency_intervals import latency_units, order_pieces
from .latency_lists import ListScheduler, single_pieces, whole_pieces
from .latency_moves import improve_by_moves
from .latency_problem import latency_problem
from .orders import topological_orders
from .problem import PlacementProblem, placement_problem
from .result import PlacementResult
from .work_bound import work_bound

__all__ = ["BASELINES", "Baseline", "place_baseline"]

Baseline = Literal["greedy", "interval-dp", "local-search", "balanced-cut"]
BASELINES: tuple[Baseline, ...] = ("greedy", "interval-dp", "local-search", "balanced-cut")
_HALVINGS = 40
_SEED = 0


def place_baseline(
    workload: Workload,
    method: Baseline,
    *,
    objective: Literal["throughput", "latency"],
    contiguous: bool,
    time_limit: float,
    progress: Progress | None = None,
    begin: float | None = None,
) -> PlacementResult:
    """The placement that a simple method gives.

    Args:
        workload: as the objective numbers its devices.
        method: one of `BASELINES`.
        contiguous: one piece a device; a balanced cut cannot promise that.
        time_limit: seconds, of local search; the others take what they take.
        progress: called with the best value and bound when one of them improves.
        begin: `time.monotonic()` from which the time limit counts; None: now.

    Raises:
        InfeasibleError: no placement exists, or the method finds none.
        UsageError: the method does not serve this mode.
    """
    if method == "balanced-cut" and contiguous:
        raise UsageError(
            "a balanced cut knows no direction of edges, so its parts are not contiguous",
            where="--method balanced-cut",
            ways_out=("add --non-contiguous", "--method interval-dp"),
        )
    search: _Search
    if objective == "throughput":
        best = Incumbent(workload, time_limit=time_limit, gap=0.0, progress=progress, begin=begin)
        search = _ForThroughput(workload, contiguous, best)
    else:
        search = _ForLatency(
            workload,
            contiguous,
            LatencyIncumbent(
                workload,
                contiguous=contiguous,
                time_limit=time_limit,
                gap=0.0,
                progress=progress,
                begin=begin,
            ),
        )
    require_feasible(workload, search.units)
    search.run(method)
    if search.best.placement is None:
        raise InfeasibleError(
            f"{method} found no placement that satisfies memory, support and contiguity",
            where="devices",
            ways_out=("--method auto, which searches", "devices with more memory"),
        )
    return search.best.result()


class _Search:
    """What both objectives share; `units` are what is placed as one."""

    best: Incumbent | LatencyIncumbent
    units: PlacementProblem

    def run(self, method: Baseline) -> None:
        order = next(topological_orders(self.units, count=1))
        if method == "greedy":
            self.greedy(order)
        elif method == "interval-dp":
            self.intervals(order)
        elif method == "balanced-cut":
            slot_of = balanced_cut(self.units, order, self.fast_slots())
            if slot_of is not None:
                self.offer(slot_of, method)
        else:
            self.greedy(order)
            self.intervals(order)
            if self.best.placement is not None:
                self.improve()

    def greedy(self, order: Sequence[int]) -> None:
        raise NotImplementedError

    def intervals(self, order: Sequence[int]) -> None:
        raise NotImplementedError

    def improve(self) -> None:
        raise NotImplementedError

    def offer(self, slot_of: Sequence[int], method: str) -> bool:
        raise NotImplementedError

    def fast_slots(self) -> list[int]:
        """Slots of the kind on which all work together takes least, and of kinds about as fast."""
        times = np.where(np.isinf(self.units.times), np.nan, self.units.times)
        mean = np.nanmean(times, axis=0)
        good = [k for k in range(len(mean)) if mean[k] <= 2 * np.nanmin(mean)]
        return [slot for slot, kind in enumerate(self.units.slots) if kind in good]

    def current(self) -> list[int]:
        """Slots of the best placement."""
        numbers = [device for group in self.units.devices for device in group]
        slot = {device: number for number, device in enumerate(numbers)}
        assert self.best.placement is not None
        return [slot[self.best.placement[members[0]]] for members in self.units.members]


class _ForThroughput(_Search):
    best: Incumbent

    def __init__(self, workload: Workload, contiguous: bool, best: Incumbent) -> None:
        self.workload, self.contiguous, self.best = workload, contiguous, best
        self.units = placement_problem(workload, contiguous=contiguous)
        best.prove(work_bound(self.units).value, "work alone")
        self.pieces: Pieces | None = None

    def offer(self, slot_of: Sequence[int], method: str) -> bool:
        placement = self.units.placement(slot_of)
        if self.contiguous and contiguity_breaks(self.workload, placement):
            return False
        return self.best.offer(self.units, slot_of, method)

    def greedy(self, order: Sequence[int]) -> None:
        low, high = 0.0, float(np.where(np.isinf(self.units.times), 0, self.units.times).sum())
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            slot_of = filled(self.units, order, self._fast_first(), middle)
            if slot_of is None:
                low = middle
            else:
                high = middle
        slot_of = filled(self.units, order, self._fast_first(), high)
        if slot_of is not None:
            self.offer(slot_of, "greedy")

    def _fast_first(self) -> list[int]:
        fast = set(self.fast_slots())
        slots = range(self.units.num_devices)
        return [s for s in slots if s in fast] + [s for s in slots if s not in fast]

    def intervals(self, order: Sequence[int]) -> None:
        pieces = best_pieces(self.units, order)
        if pieces is not None and self.offer(pieces.slot_of, "intervals of one order"):
            self.pieces = pieces

    def improve(self) -> None:
        times = {"seconds": self.best.left(), "at_most": self.best.left()}
        if not self.contiguous:
            slot_of, _ = anneal(self.units, self.current(), **times, seed=_SEED)
            self.offer(slot_of, "local search")
        elif self.pieces is not None:
            better, _ = anneal_pieces(self.units, self.pieces, **times, seed=_SEED)
            self.offer(better.slot_of, "local search")


class _ForLatency(_Search):
    best: LatencyIncumbent

    def __init__(self, workload: Workload, contiguous: bool, best: LatencyIncumbent) -> None:
        self.workload, self.contiguous, self.best = workload, contiguous, best
        self.operators = latency_problem(workload)
        self.scheduler = ListScheduler(self.operators)
        self.units = (
            latency_units(workload) if contiguous else placement_problem(workload, contiguous=False)
        )
        best.prove(latency_bound(self.operators), "paths and work")

    def offer(self, slot_of: Sequence[int], method: str) -> bool:
        placement = self.units.placement(slot_of)
        if self.contiguous:
            return self.best.offer(placement, None, method)
        whole = whole_pieces(self.operators, placement)
        better = whole is not None and self.best.offer(placement, whole, method)
        return self._offer_order(placement, method) or better

    def _offer_order(self, placement: Sequence[int], method: str) -> bool:
        order = self.scheduler.order(placement)
        return self.best.offer(placement, single_pieces(self.operators, placement, order), method)

    def _machine_slots(self) -> list[int]:
        machines = set(self.operators.machines)
        numbers = [device for group in self.units.devices for device in group]
        return [slot for slot, device in enumerate(numbers) if device in machines]

    def fast_slots(self) -> list[int]:
        return self._machine_slots() or super().fast_slots()

    def greedy(self, order: Sequence[int]) -> None:
        machines = self._machine_slots()
        hosts = [slot for slot in range(self.units.num_devices) if slot not in machines]
        slot_of = filled(self.units, order, machines + hosts, math.inf, num_hosts=len(hosts))
        if slot_of is not None:
            self.offer(slot_of, "greedy")

    def intervals(self, order: Sequence[int]) -> None:
        units = latency_units(self.workload)
        for placement in order_pieces(
            self.workload, units, next(topological_orders(units, count=1))
        ):
            if self.contiguous:
                self.best.offer(placement, None, "intervals of one order")
            else:
                whole = whole_pieces(self.operators, placement)
                self.best.offer(placement, whole, "intervals of one order")

    def improve(self) -> None:
        assert self.best.placement is not None

        def found(device_of: Sequence[int]) -> None:
            if self.contiguous:
                self.best.offer(device_of, None, "local search")
            else:
                self._offer_order(device_of, "local search")

        improve_by_moves(
            self.operators,
            self.units.members,
            self.best.placement,
            contiguous=self.contiguous,
            seconds=self.best.left(),
            seed=_SEED,
            found=found,
        )
