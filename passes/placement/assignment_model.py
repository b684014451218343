"""Free placement, whole or of some devices only, as a model for CP-SAT.

    x[v, d]     unit v is on slot d                         sum over d = 1
    inside[e,d] all pins of net e are on slot d             <= x[v, d]
    pays[e, d]  slot d pays for net e                       >= x[v, d] - inside[e, d]
    T           largest load                                sum of times * x + fees * pays <= T

A net that has a pin on a device that is not part of the model is cut wherever its pins here are.
CP-SAT finds by itself that slots of one kind are alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .cpsat import Outcome, solve
from .problem import PlacementProblem
from .whole_numbers import WholeProblem, whole_problem

__all__ = ["AssignmentAnswer", "solve_assignment"]

_CLAUSES_SHARE = 0.3  # of the solver's time; see `cpsat`


@dataclass(frozen=True, slots=True)
class AssignmentAnswer:
    """What the solver found out: slots within the limit, or that there are none, or neither."""

    slot_of: tuple[int, ...] | None
    infeasible: bool


def solve_assignment(
    problem: PlacementProblem,
    limit: float,
    *,
    precision: float,
    seconds: float,
    minimise: bool,
    open_nets: frozenset[int] = frozenset(),
    hint: Sequence[int] | None = None,
) -> AssignmentAnswer:
    """Search a placement of loads up to a limit, or the best of them.

    Args:
        precision: relative; see `whole_numbers`.
        open_nets: nets that are cut in any case, by a pin that is not in the problem.
        hint: a placement to start from; it may have a larger load.
    """
    whole = whole_problem(problem, limit, precision)
    model = _AssignmentModel(whole, limit, open_nets, minimise=minimise)
    if hint is not None:
        for unit, slot in enumerate(hint):
            for s, var in enumerate(model.at[unit]):
                if not isinstance(var, int):
                    model.model.add_hint(var, s == slot)
    outcome, solver, _ = solve(model.model, seconds=seconds, clauses_share=_CLAUSES_SHARE)
    slots = model.slots(solver) if outcome is Outcome.FOUND else None
    return AssignmentAnswer(slots, outcome is Outcome.INFEASIBLE)


class _AssignmentModel:
    def __init__(
        self, whole: WholeProblem, limit: float, open_nets: frozenset[int], *, minimise: bool
    ) -> None:
        from ortools.sat.python import cp_model

        self.whole, self.problem = whole, whole.problem
        self.model = cp_model.CpModel()
        self.kind = self.problem.slots
        self.largest: Any = whole.limit(limit)
        if minimise:
            self.largest = self.model.new_int_var(0, whole.limit(limit), "T")
            self.model.minimize(self.largest)
        self.at = [self._unit(unit) for unit in range(self.problem.num_units)]
        self.pays = [self._net(net, net in open_nets) for net in range(len(self.problem.pins))]
        self._loads()

    def _unit(self, unit: int) -> list[Any]:
        row: list[Any] = [
            0 if self.whole.times[unit][k] is None else self.model.new_bool_var(f"x_{unit}_{d}")
            for d, k in enumerate(self.kind)
        ]
        self.model.add_exactly_one(var for var in row if not isinstance(var, int))
        return row

    def _net(self, net: int, is_open: bool) -> list[Any]:
        pins, fees = self.problem.pins[net], self.whole.fees[net]
        row: list[Any] = [0] * len(self.kind)
        for d, k in enumerate(self.kind):
            here = [self.at[v][d] for v in pins if not isinstance(self.at[v][d], int)]
            if not fees[k] or not here:
                continue
            row[d] = self.model.new_bool_var(f"pays_{net}_{d}")
            if is_open or len(here) < len(pins):
                for var in here:
                    self.model.add_implication(var, row[d])
                continue
            if len(here) == 2:
                for a, b in (here, here[::-1]):
                    self.model.add_bool_or([a.negated(), b, row[d]])
                continue
            inside = self.model.new_bool_var(f"inside_{net}_{d}")
            for var in here:
                self.model.add_implication(inside, var)
                self.model.add_bool_or([var.negated(), inside, row[d]])
        return row

    def _loads(self) -> None:
        for d, k in enumerate(self.kind):
            terms = [
                (row[d], self.whole.times[v][k] or 0)
                for v, row in enumerate(self.at)
                if not isinstance(row[d], int)
            ]
            terms += [
                (row[d], self.whole.fees[e][k])
                for e, row in enumerate(self.pays)
                if not isinstance(row[d], int)
            ]
            self.model.add(sum(var * factor for var, factor in terms if factor) <= self.largest)
            held = self.whole.memory[k]
            if held is not None:
                sizes = [
                    row[d] * self.whole.sizes[v]
                    for v, row in enumerate(self.at)
                    if not isinstance(row[d], int) and self.whole.sizes[v]
                ]
                self.model.add(sum(sizes) <= held)

    def slots(self, solver: Any) -> tuple[int, ...]:
        return tuple(
            next(d for d, var in enumerate(row) if not isinstance(var, int) and solver.value(var))
            for row in self.at
        )
