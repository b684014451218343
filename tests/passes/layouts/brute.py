"""Enumerate every choice of a small layout problem; random problems and graphs for hypothesis."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

from hypothesis import strategies as st

from cutset.compiler.ir.graph import Graph, Mode, Value
from cutset.passes.layouts.problem import (
    Choice,
    Flow,
    LayoutProblem,
    Option,
    Use,
    figures,
    flow_seconds,
)
from tests.ir.builders import GraphBuilder

_SMALL = st.integers(0, 9)


def picks_of(problem: LayoutProblem) -> Iterator[tuple[int, ...]]:
    """Every pick of an option for each choice."""
    return itertools.product(*(range(len(choice.options)) for choice in problem.choices))


def legal_picks(
    problem: LayoutProblem, weight: Callable[[Option], float], most: float
) -> Iterator[tuple[int, ...]]:
    """The picks whose conversions all exist and that cost at most `most`, depth first.

    Args:
        weight: what an option costs, in which flows cost their seconds.
    """
    yield from _Depth(problem, weight, most).picks(0, 0.0)


class _Depth:
    """Choices in an order that completes flows soon; of what is open the least is counted."""

    def __init__(
        self, problem: LayoutProblem, weight: Callable[[Option], float], most: float
    ) -> None:
        self.problem = problem
        self.most = most
        self.order = _order(problem)
        place = {choice: position for position, choice in enumerate(self.order)}
        self.weights = [[c.count * weight(o) for o in c.options] for c in problem.choices]
        self.done: list[list[Flow]] = [[] for _ in self.order]
        for flow in problem.flows:
            members = (flow.maker, *(use.choice for use in flow.uses))
            self.done[max(place[choice] for choice in members)].append(flow)
        self.rest = [0.0]  # after each position, at least
        for position in reversed(range(len(self.order))):
            least = min(self.weights[self.order[position]])
            least += sum(_least_seconds(flow) for flow in self.done[position])
            self.rest.insert(0, self.rest[0] + least)
        self.taken = [0] * len(self.order)

    def picks(self, position: int, spent: float) -> Iterator[tuple[int, ...]]:
        if position == len(self.order):
            yield tuple(self.taken)
            return
        choice = self.order[position]
        for option, cost in enumerate(self.weights[choice]):
            self.taken[choice] = option
            total = spent + cost
            for flow in self.done[position]:
                total += flow.count * flow_seconds(flow, self.taken)
            if total + self.rest[position + 1] <= self.most:
                yield from self.picks(position + 1, total)


def _order(problem: LayoutProblem) -> list[int]:
    """As they come, but tensors that are given right after all that reads them."""
    makers = {flow.maker for flow in problem.flows}
    users = {use.choice for flow in problem.flows for use in flow.uses}
    given = makers - users
    table: list[int] = []
    for choice in (c for c in range(len(problem.choices)) if c not in given):
        table.append(choice)
        for flow in problem.flows:
            ready = all(use.choice in table for use in flow.uses)
            if flow.maker in given and flow.maker not in table and ready:
                table.append(flow.maker)
    return table + [choice for choice in sorted(given) if choice not in table]


def _least_seconds(flow: Flow) -> float:
    """No picks pay less for `flow`."""
    added = sum(use.count * min(flow.use_seconds[form] for form in use.forms) for use in flow.uses)
    pairs = (sum(min(0.0, cost) for cost in row) for row in flow.pair_seconds)
    return flow.count * (added + min(a + b for a, b in zip(flow.made_seconds, pairs, strict=True)))


def brute_force(problem: LayoutProblem) -> float:
    """The least objective of all legal picks; infinite if there are none."""
    best = math.inf
    for picks in picks_of(problem):
        found = figures(problem, picks)
        if found.is_legal(problem):
            best = min(best, found.objective(problem))
    return best


@st.composite
def problems(draw: st.DrawFn) -> LayoutProblem:
    """Up to 5 choices of up to 3 options, flows shared by several users, memory often binding."""
    count = draw(st.integers(2, 5))
    option = st.builds(
        Option, _SMALL.map(float), _SMALL.map(float), _SMALL, st.integers(0, 3), _SMALL
    )
    choices = tuple(
        Choice(f"c{i}", tuple(draw(st.lists(option, min_size=1, max_size=3))), draw(_COUNT))
        for i in range(count)
    )
    flows = tuple(
        draw(_flows(choices, maker))
        for maker in range(count - 1)
        for _ in range(draw(st.integers(0, 2)))
    )
    memory = draw(st.none() | st.integers(20, 90))
    price = draw(st.sampled_from((0.0, 0.0, 0.5)))
    return LayoutProblem(choices, flows, draw(_COUNT), memory, draw(_COUNT), price)


_COUNT = st.integers(1, 3)
_KINDS = ("linear", "bias", "relu", "add", "view", "softmax", "sum", "table", "batch")


@st.composite
def _flows(draw: st.DrawFn, choices: tuple[Choice, ...], maker: int) -> Flow:
    states, forms = draw(_COUNT), draw(_COUNT)
    users = draw(
        st.lists(st.integers(maker + 1, len(choices) - 1), min_size=1, max_size=3, unique=True)
    )
    uses = tuple(
        Use(user, draw(_indices(len(choices[user].options), forms)), draw(_COUNT)) for user in users
    )
    cost = st.sampled_from((0.0, 0.0, 1.0, 4.0, 9.0, -1.0, math.inf))
    part = st.sampled_from((0.0, 0.5, 1.0))
    number = st.integers(-1, 1)
    return Flow(
        name=f"f{maker}",
        maker=maker,
        states=draw(_indices(len(choices[maker].options), states)),
        uses=uses,
        pair_seconds=tuple(tuple(draw(cost) for _ in range(forms)) for _ in range(states)),
        pair_backward=tuple(tuple(draw(part) for _ in range(forms)) for _ in range(states)),
        conversions=tuple(range(forms)),
        use_seconds=tuple(draw(_SMALL.map(float)) for _ in range(forms)),
        made_seconds=tuple(-draw(_SMALL.map(float)) for _ in range(states)),
        kept=tuple(tuple(draw(number) for _ in range(forms)) for _ in range(states)),
        own_kept=tuple(draw(number) for _ in range(states)),
        tensor_bytes=(draw(_SMALL), draw(_SMALL)),
        family=draw(st.integers(0, 2)),
        count=draw(_COUNT),
    )


def _indices(length: int, limit: int) -> st.SearchStrategy[tuple[int, ...]]:
    return st.tuples(*[st.integers(0, limit - 1)] * length)


@st.composite
def graphs(draw: st.DrawFn, most_nodes: int = 4) -> Graph:
    """Linear, elementwise, view, softmax and sum nodes on a few rows, ending in a loss; some on
    what does not grow with the rows: tables made of a buffer, sums over all of the batch."""
    build = GraphBuilder("random", Mode.TRAIN)
    live: list[Value] = [build.input("x", (8, 4, 16)), build.input("mask", (8, 4, 16))]
    for number in range(draw(st.integers(1, most_nodes))):
        live.append(_node(draw, build, live, number))
    last = live[-1]
    other = draw(st.sampled_from(live))
    if other.type == last.type:
        last = build.op("aten.mul.Tensor", last, other)
    build.loss(build.op("aten.sum.default", last))
    return build.build()


def _node(draw: st.DrawFn, build: GraphBuilder, live: list[Value], number: int) -> Value:
    x = draw(st.sampled_from(live[-2:]))
    width = x.type.shape[-1]
    match draw(st.sampled_from(_KINDS)):
        case "linear":
            weight = build.parameter(f"w{number}", (16, width))
            return build.op("aten.linear.default", x, weight)
        case "bias":
            weight, bias = (
                build.parameter(f"w{number}", (8, width)),
                build.parameter(f"b{number}", (8,)),
            )
            return build.op("aten.linear.default", x, weight, bias)
        case "add":
            same = [value for value in live if value.type == x.type]
            return build.op("aten.add.Tensor", x, draw(st.sampled_from(same)))
        case "view" if len(x.type.shape) == 3:
            rows, columns, _ = x.type.shape
            return build.op("aten.view.default", x, (rows * columns, width))
        case "table":
            table = build.op("aten.relu.default", build.buffer(f"t{number}", (width,)))
            return build.op("aten.mul.Tensor", x, table)
        case "batch":
            total = build.op("aten.sum.dim_IntList", x, tuple(range(len(x.type.shape) - 1)), False)
            return build.op("aten.add.Tensor", x, build.op("aten.relu.default", total))
        case "softmax":
            return build.op("aten.softmax.int", x, -1)
        case "sum":
            return build.op("aten.sum.dim_IntList", x, (len(x.type.shape) - 1,), True)
        case _:
            return build.op("aten.relu.default", x)
