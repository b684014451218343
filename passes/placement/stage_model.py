"""Contiguous placement below a value, as a model for CP-SAT.

Stages s = 0 .. D-1 follow each other; each is one device.

    y[v, s]     unit v is at stage s or before              y[v, s] <= y[v, s+1]
    z[s, k]     stage s is a device of kind k               sum over k = 1, sum over s = count_k
    x[v, s, k]  unit v is at stage s, of kind k             sum over k = y[v, s] - y[v, s-1], <= z
    inside[e,s] all pins of net e are at stage s            <= sum over k of x[v, s, k]
    pays[e,s,k] the device of stage s, of kind k, pays e    >= x[v, s, k] - inside[e, s]

    order    y[v, s] <= y[u, s] for every arc u -> v (`_arcs`); as y counts from the first stage,
             no two solutions differ in names of devices only
    load     sum of times * x + sum of fees * pays <= limit * z[s, k] (`_loads`)
    memory   sum of sizes * x <= memory_k (`_loads`)
    windows  a unit's ancestors, with it, fit into the stages up to its own (`windows`)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .cpsat import Outcome, solve
from .intervals import Pieces
from .problem import PlacementProblem
from .whole_numbers import WholeProblem, whole_problem
from .windows import Windows, windows

__all__ = ["StageAnswer", "solve_stages"]

_CLAUSES_SHARE = 0.7  # of the solver's time; see `cpsat`


@dataclass(frozen=True, slots=True)
class StageAnswer:
    """What the solver found out: pieces within the limit, or that there are none, or neither.

    Args:
        spent: seconds that the solver's work usually takes.
    """

    pieces: Pieces | None
    infeasible: bool
    spent: float


def solve_stages(
    problem: PlacementProblem,
    limit: float,
    *,
    precision: float,
    seconds: float,
    at_most: float,
) -> StageAnswer:
    """Search contiguous pieces of loads up to a limit (see `whole_numbers` for the rounding).

    Args:
        seconds, at_most: see `cpsat`.
    """
    found = windows(problem, limit)
    if found is None:
        return StageAnswer(None, True, 0.0)
    whole = whole_problem(problem, limit, precision)
    model = _StageModel(whole, found, whole.limit(limit))
    outcome, solver, spent = solve(
        model.model, seconds=seconds, clauses_share=_CLAUSES_SHARE, at_most=at_most
    )
    pieces = model.pieces(solver) if outcome is Outcome.FOUND else None
    return StageAnswer(pieces, outcome is Outcome.INFEASIBLE, spent)


class _StageModel:
    def __init__(self, whole: WholeProblem, window: Windows, limit: int) -> None:
        from ortools.sat.python import cp_model

        self.whole, self.window, self.limit = whole, window, limit
        self.problem = whole.problem
        self.model = cp_model.CpModel()
        self.stages = range(self.problem.num_devices)
        self.kinds = range(len(self.problem.counts))
        self.kind_at = self._kinds_of_stages()
        self.up_to: list[list[Any]] = []
        self.at: list[list[list[Any]]] = []
        self._units()
        self._arcs()
        self._loads()

    def _kinds_of_stages(self) -> list[list[Any]]:
        if len(self.kinds) == 1:
            return [[1] for _ in self.stages]
        table = [[self.model.new_bool_var(f"z_{s}_{k}") for k in self.kinds] for s in self.stages]
        for row in table:
            self.model.add_exactly_one(row)
        for kind in self.kinds:
            self.model.add(sum(row[kind] for row in table) == self.problem.counts[kind])
        return table

    def _units(self) -> None:
        model = self.model
        for unit, (first, final) in enumerate(self.window):
            up_to = [
                0 if s < first else 1 if s >= final else model.new_bool_var(f"y_{unit}_{s}")
                for s in self.stages
            ]
            for s in range(first, final - 1):
                model.add_implication(up_to[s], up_to[s + 1])
            self.up_to.append(up_to)
            self.at.append([self._unit_at(unit, s) for s in self.stages])

    def _unit_at(self, unit: int, stage: int) -> list[Any]:
        """x[v, s, k] for every kind; 0 outside the window and on kinds that do not support it."""
        first, final = self.window[unit]
        kinds = [k for k in self.kinds if self.whole.times[unit][k] is not None]
        if not first <= stage <= final:
            return [0] * len(self.kinds)
        row: list[Any] = [0] * len(self.kinds)
        for k in kinds:
            row[k] = self.model.new_bool_var(f"x_{unit}_{stage}_{k}")
            if len(self.kinds) > 1:
                self.model.add_implication(row[k], self.kind_at[stage][k])
        before = self.up_to[unit][stage - 1] if stage else 0
        self.model.add(sum(row) == self.up_to[unit][stage] - before)
        return row

    def _arcs(self) -> None:
        for u, v in self.problem.arcs:
            for s in self.stages:
                early, late = self.up_to[u][s], self.up_to[v][s]
                if not isinstance(late, int) and not isinstance(early, int):
                    self.model.add_implication(late, early)
                elif isinstance(late, int) and late and not isinstance(early, int):
                    self.model.add(early == 1)
                elif isinstance(early, int) and not early and not isinstance(late, int):
                    self.model.add(late == 0)
                elif isinstance(early, int) and isinstance(late, int) and late > early:
                    self.model.add_bool_or([])

    def _loads(self) -> None:
        units = range(self.problem.num_units)
        pays = [self._net_at(net) for net in range(len(self.problem.pins))]
        for s in self.stages:
            for k in self.kinds:
                times = [
                    (var, self.whole.times[v][k] or 0)
                    for v in units
                    if not isinstance(var := self.at[v][s][k], int)
                ]
                fees = [
                    (var, self.whole.fees[e][k])
                    for e, table in enumerate(pays)
                    if not isinstance(var := table[s][k], int)
                ]
                self._at_most([*times, *fees], self.limit, self.kind_at[s][k])
                held = self.whole.memory[k]
                if held is not None:
                    bytes_ = [
                        (self.at[v][s][k], self.whole.sizes[v])
                        for v in units
                        if not isinstance(self.at[v][s][k], int)
                    ]
                    if sum(size for _, size in bytes_) > held:
                        self._at_most(bytes_, held, self.kind_at[s][k])

    def _at_most(self, terms: Sequence[tuple[Any, int]], limit: int, kind: Any) -> None:
        terms = [(var, factor) for var, factor in terms if factor]
        if terms:
            self.model.add(sum(var * factor for var, factor in terms) <= limit * kind)

    def _net_at(self, net: int) -> list[list[Any]]:
        """pays[e, s, k] for every stage and kind."""
        pins, fees = self.problem.pins[net], self.whole.fees[net]
        table: list[list[Any]] = []
        for s in self.stages:
            here = [self.at[v][s] for v in pins]
            possible = [any(not isinstance(x, int) for x in row) for row in here]
            row: list[Any] = [0] * len(self.kinds)
            table.append(row)
            if not any(possible):
                continue
            inside: Any = 0
            if all(possible):
                inside = self.model.new_bool_var(f"inside_{net}_{s}")
                for one in here:
                    self.model.add(inside <= sum(one))
            for k in self.kinds:
                present = [one[k] for one in here if not isinstance(one[k], int)]
                if fees[k] and present:
                    row[k] = self.model.new_bool_var(f"pays_{net}_{s}_{k}")
                    for var in present:
                        self.model.add_bool_or(
                            [var.negated(), row[k]]
                            if isinstance(inside, int)
                            else [var.negated(), inside, row[k]]
                        )
        return table

    def pieces(self, solver: Any) -> Pieces:
        """The solver's stages, with devices of each kind taken in order."""
        free = [
            [slot for slot, kind in enumerate(self.problem.slots) if kind == k] for k in self.kinds
        ]
        sequence = []
        for row in self.kind_at:
            kind = next(k for k, var in enumerate(row) if isinstance(var, int) or solver.value(var))
            sequence.append(free[kind].pop(0))
        stage_of = [
            next(
                s
                for s, var in enumerate(row)
                if (var if isinstance(var, int) else solver.value(var))
            )
            for row in self.up_to
        ]
        return Pieces(tuple(sequence[s] for s in stage_of), tuple(sequence))
