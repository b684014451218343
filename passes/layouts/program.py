"""The layout problem as an integer linear program: build, solve, decode.

For choices c with options o, flows f with states m, forms w and uses u:

    x[c,o] in {0,1}     c takes o; sum_o x = 1                                      `_choose`
    z[f,m] = sum of x of the maker's options that make m
    d[u,w] = sum of x of the user's options that want w
    t[u,m,w] >= 0       it wants w while m is made: sum_w t = z, sum_m t = d        `_meet`
    y[f,m,w] >= t[u,m,w]  for all u: the conversion is paid once                    `_convert`
    s[f,k] >= t[u,m,w]  if then tensor k is read in backward: it is kept            `_keep`
    b[g] >= sum_k bytes s[f,k]   for flows f of family g                            `_keep`
    static + in_flight (saved + sum_g b[g]) + transient <= memory                   `_remember`
    sum over c of x[c,forbidden] <= choices - 1   not all of a forbidden combination `_cut`
    minimise seconds of the options + conversions + price of the bytes held

The marginals `t` make the relaxation that of the local polytope: exact on trees of flows
(Wainwright and Jordan, 2008), and integral on the graphs of models without a limit of memory, so
the linear program is solved first and integers are asked for only if it is fractional. Marginals
are left out where one side has one member, conversions where one use has all of it or they are
free.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from .problem import Flow, LayoutProblem, figures

__all__ = ["LayoutProgram", "SolvedLayouts", "Statistics", "build", "relax", "solve"]

_SCALE = 1e4  # the objective in units of this part of the best that any one option can do
_INTEGRAL = 1e-6
_TOLERANCE = 1e-3  # gap at which a choice counts as optimal in a larger program
_SMALL = 1000  # variables up to which the integer program is solved, whatever it takes
_PRICES = (1.0, 1.02, 1.1, 1.5, 3.0, 10.0)  # multiples of the relaxation's price of memory
_MOST_NODES = 50  # of the branch-and-bound tree: a limit that is the same on every machine

Expression = dict[int, float]  # variable -> coefficient


@dataclass(frozen=True, slots=True)
class Statistics:
    """Size and course of one solve."""

    num_variables: int
    num_constraints: int
    relaxation_integral: bool
    method: str


@dataclass(frozen=True, slots=True)
class SolvedLayouts:
    """Options picked, their objective in seconds, and a bound that no pick is below."""

    picks: tuple[int, ...]
    objective: float
    lower_bound: float
    statistics: Statistics


@dataclass(slots=True)
class LayoutProgram:
    """Columns and rows while a program is built. Variables are in [0, upper]."""

    problem: LayoutProblem
    names: list[str] = field(default_factory=list)
    cost: list[float] = field(default_factory=list)
    upper: list[float] = field(default_factory=list)
    integers: list[int] = field(default_factory=list)
    rows: list[tuple[Expression, float, float]] = field(default_factory=list)
    constant: float = 0.0
    options: list[list[int | None]] = field(default_factory=list)
    kept: dict[int, list[Expression]] = field(default_factory=lambda: defaultdict(list))

    def variable(self, name: str, cost: float = 0.0, upper: float = 1.0) -> int:
        self.names.append(name)
        self.cost.append(cost)
        self.upper.append(upper)
        return len(self.names) - 1

    def row(self, terms: Mapping[int, float], low: float, high: float) -> None:
        self.rows.append((dict(terms), low, high))

    def equal(self, left: Expression, right: Expression, offset: float) -> None:
        """left = right + offset."""
        terms = defaultdict(float, left)
        for variable, coefficient in right.items():
            terms[variable] -= coefficient
        self.row(terms, offset, offset)


@dataclass(frozen=True, slots=True)
class _Indicator:
    """A 0/1 expression: sum of variables plus a constant."""

    terms: tuple[int, ...]
    constant: float = 0.0

    @property
    def expression(self) -> Expression:
        return dict.fromkeys(self.terms, 1.0)


def _either(indicators: Sequence[_Indicator]) -> _Indicator:
    """Of indicators that exclude each other, whether one holds."""
    terms = tuple(dict.fromkeys(variable for item in indicators for variable in item.terms))
    return _Indicator(terms, min(1.0, sum(item.constant for item in indicators)))


def build(problem: LayoutProblem) -> LayoutProgram:
    """The program of `problem`."""
    program = LayoutProgram(problem)
    _choose(program)
    for flow in problem.flows:
        _flow(program, flow)
    if problem.counts_bytes:
        _remember(program)
    return program


def _choose(program: LayoutProgram) -> None:
    for index, choice in enumerate(program.problem.choices):
        weights = [choice.count * program.problem.weight(option) for option in choice.options]
        if len(weights) == 1:
            program.options.append([None])
            program.constant += weights[0]
            continue
        variables = [
            program.variable(f"x[{index},{option}]", weight)
            for option, weight in enumerate(weights)
        ]
        program.integers.extend(variables)
        program.options.append(list(variables))
        program.row(dict.fromkeys(variables, 1.0), 1.0, 1.0)


def _indicators(
    program: LayoutProgram, choice: int, classes: Sequence[int]
) -> dict[int, _Indicator]:
    """By class: whether the option taken is of that class."""
    groups: dict[int, list[int]] = defaultdict(list)
    for option, group in enumerate(classes):
        variable = program.options[choice][option]
        if variable is None:
            return {group: _Indicator((), 1.0)}
        groups[group].append(variable)
    if len(groups) == 1:
        return {next(iter(groups)): _Indicator((), 1.0)}
    return {group: _Indicator(tuple(variables)) for group, variables in groups.items()}


def _pay(program: LayoutProgram, indicator: _Indicator, cost: float) -> None:
    program.constant += cost * indicator.constant
    for variable in indicator.terms:
        program.cost[variable] += cost


def _flow(program: LayoutProgram, flow: Flow) -> None:
    states = _indicators(program, flow.maker, flow.states)
    for state, made in states.items():
        _pay(program, made, flow.count * flow.made_seconds[state])
    together: dict[tuple[int, int], list[_Indicator]] = defaultdict(list)
    costs: dict[tuple[int, int], float] = {}
    kept: dict[int, list[_Indicator]] = defaultdict(list)
    for use in flow.uses:
        forms = _indicators(program, use.choice, use.forms)
        for form, wanted in forms.items():
            _pay(program, wanted, flow.count * use.count * flow.use_seconds[form])
        wanted_by_pair: dict[tuple[int, int], list[_Indicator]] = defaultdict(list)
        for (state, form), indicator in _meet(program, flow, states, forms).items():
            pair = (state, flow.conversions[form])
            wanted_by_pair[pair].append(indicator)
            costs[pair] = flow.pair_seconds[state][form]
            kept[flow.kept[state][form]].append(indicator)
        for pair, indicators in wanted_by_pair.items():
            together[pair].append(_either(indicators))
    for pair, indicators in together.items():
        _convert(program, flow.count * costs[pair], indicators)
    for state, made in states.items():
        kept[flow.own_kept[state]].append(made)
    if program.problem.counts_bytes:
        _keep(program, flow, kept)


def _meet(
    program: LayoutProgram,
    flow: Flow,
    states: dict[int, _Indicator],
    forms: dict[int, _Indicator],
) -> dict[tuple[int, int], _Indicator]:
    """t[u,m,w] of one use; pairs without conversion are ruled out."""
    pairs = [(m, w) for m in states for w in forms if math.isfinite(flow.pair_seconds[m][w])]
    if len(states) == 1 or len(forms) == 1:
        for m in states:
            for w in forms:
                if (m, w) not in pairs:
                    _forbid(program, forms[w] if len(states) == 1 else states[m])
        return {(m, w): forms[w] if len(states) == 1 else states[m] for m, w in pairs}
    table = {pair: program.variable(f"t[{flow.name},{pair[0]},{pair[1]}]") for pair in pairs}
    for m, made in states.items():
        program.equal({table[p]: 1.0 for p in pairs if p[0] == m}, made.expression, made.constant)
    for w, want in forms.items():
        program.equal({table[p]: 1.0 for p in pairs if p[1] == w}, want.expression, want.constant)
    return {pair: _Indicator((variable,)) for pair, variable in table.items()}


def _forbid(program: LayoutProgram, indicator: _Indicator) -> None:
    for variable in indicator.terms:
        program.upper[variable] = 0.0
    if indicator.constant:
        program.row({}, 1.0, 1.0)  # infeasible, as it should be


def _convert(program: LayoutProgram, cost: float, indicators: Sequence[_Indicator]) -> None:
    distinct = tuple(dict.fromkeys(indicators))
    certain = next((item for item in distinct if item.constant), None)
    if cost == 0.0:
        return
    if len(distinct) == 1 or certain is not None:
        _pay(program, certain or distinct[0], cost)
        return
    paid = program.variable(f"y[{len(program.names)}]", cost)
    for item in distinct:
        program.row({paid: 1.0, **dict.fromkeys(item.terms, -1.0)}, 0.0, math.inf)
    if cost < 0.0:
        terms = dict.fromkeys((v for item in distinct for v in item.terms), -1.0)
        program.row({paid: 1.0, **terms}, -math.inf, 0.0)


# -- memory ----------------------------------------------------------------------------------------


def _remember(program: LayoutProgram) -> None:
    """Price and limit of memory."""
    problem = program.problem
    unit = float(max(problem.memory_bytes or 1 << 30, 1))
    total, fixed = _held(program, unit)
    program.constant += problem.seconds_per_byte * unit * fixed
    for variable, coefficient in total.items():
        program.cost[variable] += problem.seconds_per_byte * unit * coefficient
    if problem.memory_bytes is not None:
        total[_transient(program, unit)] += 1.0
        program.row(total, -math.inf, problem.memory_bytes / unit - fixed)


def _held(program: LayoutProgram, unit: float) -> tuple[Expression, float]:
    """Static and saved bytes in units: what depends on choices, what does not."""
    problem = program.problem
    total: Expression = defaultdict(float)
    fixed = 0.0
    for choice, variables in zip(problem.choices, program.options, strict=True):
        for option, variable in zip(choice.options, variables, strict=True):
            held = choice.count * (option.static_bytes + problem.in_flight * option.saved_bytes)
            if variable is None:
                fixed += held / unit
            else:
                total[variable] += held / unit
    for family, kept_by_flow in program.kept.items():
        most = program.variable(f"b[{family}]", upper=math.inf)
        for kept in kept_by_flow:
            terms = {variable: -num_bytes / unit for variable, num_bytes in kept.items()}
            program.row({most: 1.0, **terms}, 0.0, math.inf)
        total[most] += problem.in_flight
    return total, fixed


def _transient(program: LayoutProgram, unit: float) -> int:
    """Variable that is at least every transient, in units."""
    transient = program.variable("transient", upper=math.inf)
    for choice, variables in zip(program.problem.choices, program.options, strict=True):
        terms: Expression = {transient: 1.0}
        low = 0.0
        for option, variable in zip(choice.options, variables, strict=True):
            if variable is None:
                low = option.transient_bytes / unit
            else:
                terms[variable] = -option.transient_bytes / unit
        program.row(terms, low, math.inf)
    return transient


def _keep(program: LayoutProgram, flow: Flow, kept: Mapping[int, Sequence[_Indicator]]) -> None:
    """Bytes of `flow` that stay, as an expression for its family."""
    terms: Expression = {
        _any(program, indicators): float(flow.count * flow.tensor_bytes[number])
        for number, indicators in kept.items()
        if number >= 0
    }
    if terms:
        program.kept[flow.family].append(terms)


def _any(program: LayoutProgram, indicators: Sequence[_Indicator]) -> int:
    kept = program.variable(f"s[{len(program.names)}]")
    for item in indicators:
        program.row({kept: 1.0, **dict.fromkeys(item.terms, -1.0)}, item.constant, math.inf)
    return kept


# -- solving ---------------------------------------------------------------------------------------


def solve(problem: LayoutProblem, *forbidden: Mapping[int, int]) -> SolvedLayouts | None:
    """The best options: by the linear relaxation, by branching if that is fractional.

    Args:
        forbidden: combinations of options by choice; of each at least one must not be taken.

    Returns:
        None if no options are legal, or in a large program if none were found within the memory.
    """
    program = build(problem)
    for combination in forbidden:
        _cut(program, combination)
    relaxed = _run(program, "glop")
    if relaxed is None:
        return None
    integral = _is_integral(program, relaxed.values)
    if integral:
        return _solved(program, _decode(program, relaxed.values), relaxed.bound, integral, "GLOP")
    if problem.memory_bytes is not None and len(program.names) > _SMALL:
        priced = _by_price(problem, relaxed, len(program.rows) - 1)
        if priced is None:
            return None
        return _solved(program, priced, relaxed.bound, integral, "GLOP, memory priced")
    branched = _run(program, "scip")
    if branched is None:
        return None
    bound = max(relaxed.bound, branched.bound)
    return _solved(program, _decode(program, branched.values), bound, integral, "GLOP, then SCIP")


def relax(problem: LayoutProblem) -> float:
    """Seconds that no options of `problem` take less than, by the linear relaxation; infinite if
    that has no solution."""
    relaxed = _run(build(problem), "glop")
    return math.inf if relaxed is None else relaxed.bound


def _by_price(problem: LayoutProblem, relaxed: _Run, row: int) -> tuple[int, ...] | None:
    """Picks that fit, with memory paid for instead of limited; None if no price brings any.

    At the price that the relaxation gives memory (the dual of its row), the program without a limit
    has optima on both sides of the limit; a little above it, what it finds fits (Lagrangian
    relaxation, Everett 1963) and costs little more than the relaxation.
    """
    assert problem.memory_bytes is not None
    price = abs(relaxed.duals[row]) / problem.memory_bytes

    def at(factor: float) -> tuple[int, ...] | None:
        priced = build(replace(problem, memory_bytes=None, seconds_per_byte=factor * price))
        found = _run(priced, "glop")
        if found is None:
            return None
        picks = _decode(priced, found.values)  # rounded, where it is fractional all the same
        return picks if figures(problem, picks).is_legal(problem) else None

    *prices, highest = _PRICES
    leanest = at(highest)
    if leanest is None:  # what costs more takes less
        return None
    return next((picks for factor in prices if (picks := at(factor)) is not None), leanest)


def _cut(program: LayoutProgram, forbidden: Mapping[int, int]) -> None:
    """A no-good cut; choices that have one option cannot help."""
    terms: Expression = {}
    for choice, option in forbidden.items():
        variable = program.options[choice][option]
        if variable is not None:
            terms[variable] = 1.0
    program.row(terms, -math.inf, len(terms) - 1.0)


def _is_integral(program: LayoutProgram, values: Sequence[float]) -> bool:
    return all(min(values[v], 1.0 - values[v]) <= _INTEGRAL for v in program.integers)


def _solved(
    program: LayoutProgram, picks: tuple[int, ...], bound: float, integral: bool, method: str
) -> SolvedLayouts:
    objective = figures(program.problem, picks).objective(program.problem)
    statistics = Statistics(len(program.names), len(program.rows), integral, method)
    return SolvedLayouts(picks, objective, min(bound, objective), statistics)


def _decode(program: LayoutProgram, values: Sequence[float]) -> tuple[int, ...]:
    return tuple(
        0
        if variables[0] is None
        else max(range(len(variables)), key=lambda i: (values[variables[i] or 0], -i))
        for variables in program.options
    )


@dataclass(frozen=True, slots=True)
class _Run:
    """Values of all variables, the bound in seconds, and of a relaxation the duals of its rows."""

    values: list[float]
    bound: float
    duals: list[float]


def _run(program: LayoutProgram, solver_name: str) -> _Run | None:
    """Solve the relaxation (`glop`) or the integer program (`scip`); None: infeasible."""
    from ortools.linear_solver.python import model_builder

    branches = solver_name == "scip"
    tolerance = 0.0 if len(program.names) <= _SMALL else _TOLERANCE
    scale = _SCALE / max(sum(map(abs, program.cost)), 1e-30)
    model = _model(program, scale, integers=branches)
    solver = model_builder.Solver(solver_name)
    if branches:
        solver.set_solver_specific_parameters(
            f"limits/nodes = {_MOST_NODES}\nlimits/gap = {tolerance}\n"
            "randomization/randomseedshift = 1\nmisc/catchctrlc = FALSE"
        )
    status = solver.solve(model)
    if status not in (model_builder.SolveStatus.OPTIMAL, model_builder.SolveStatus.FEASIBLE):
        return None
    values = [float(value) for value in solver.values(model.get_variables())]
    reached = solver.best_objective_bound if branches else solver.objective_value
    duals: list[float] = []
    if not branches:
        rows = solver.dual_values(model.get_linear_constraints())
        duals = [float(value) / scale for value in rows]
    return _Run(values, float(reached) / scale + program.constant, duals)


def _model(program: LayoutProgram, scale: float, *, integers: bool) -> Any:
    """The program in OR-Tools' form, by its low-level calls: they are ten times as fast."""
    from ortools.linear_solver.python import model_builder

    model: Any = model_builder.Model()  # type: ignore[no-untyped-call]
    helper = model.helper
    whole = set(program.integers) if integers else set()
    for index, (cost, upper) in enumerate(zip(program.cost, program.upper, strict=True)):
        helper.add_var()
        helper.set_var_lower_bound(index, 0.0)
        helper.set_var_upper_bound(index, upper)
        helper.set_var_objective_coefficient(index, cost * scale)
        helper.set_var_integrality(index, index in whole)
    for index, (terms, low, high) in enumerate(program.rows):
        helper.add_linear_constraint()
        helper.set_constraint_lower_bound(index, low)
        helper.set_constraint_upper_bound(index, high)
        for variable, coefficient in terms.items():
            helper.add_term_to_constraint(index, variable, coefficient)
    return model
