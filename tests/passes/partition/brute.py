"""Enumerate every partition of a small stage problem; random problems for hypothesis."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

from hypothesis import strategies as st

from cutset.compiler.ir.cluster import Link
from cutset.cost_models.overlap import Overlap
from cutset.passes.partition.objective import is_legal, step_seconds
from cutset.passes.partition.problem import (
    Assignment,
    DeviceClass,
    Flow,
    Shared,
    StageProblem,
    Unit,
)


def brute_force(
    problem: StageProblem, stage_counts: tuple[int, ...]
) -> tuple[float, Assignment | None]:
    """The fastest legal partition, by trying all of them."""
    best, chosen = math.inf, None
    for count in stage_counts:
        sequences = [
            classes
            for classes in itertools.product(range(len(problem.classes)), repeat=count)
            if all(classes.count(i) <= len(c.devices) for i, c in enumerate(problem.classes))
        ]
        for stages in itertools.product(range(count), repeat=len(problem.units)):
            if len(set(stages)) != count or any(stages[a] > stages[b] for a, b in problem.edges()):
                continue
            for classes in sequences:
                candidate = Assignment(stages, classes)
                if is_legal(problem, candidate) and step_seconds(problem, candidate) < best:
                    best, chosen = step_seconds(problem, candidate), candidate
    return best, chosen


def chain(seconds: tuple[float, ...], devices: int = 2) -> StageProblem:
    """Units of the given seconds, each feeding the next."""
    units = tuple(Unit(f"u{i}", (s / 2,), (s / 2,)) for i, s in enumerate(seconds))
    flows = tuple(Flow(i, (i + 1,), 1, 1) for i in range(len(seconds) - 1))
    link = Link(0.0, 1e9)
    classes = (DeviceClass(0, 1 << 30, tuple(range(devices))),)
    return StageProblem(units, flows, (), classes, ((link,),), link, 4, "1f1b")


@st.composite
def problems(draw: st.DrawFn) -> StageProblem:
    """Random DAGs of up to 8 units on 2 to 4 devices of up to 3 classes, memory often binding."""
    devices, most = draw(st.sampled_from(((2, 8), (3, 7), (4, 5))))
    count = draw(st.integers(devices, most))
    num_types = draw(st.integers(1, 2))
    small = st.integers(0, 20)
    seconds = st.tuples(*[st.integers(1, 20).map(float)] * num_types)
    units = tuple(
        Unit(
            f"u{index}",
            draw(seconds),
            draw(seconds),
            draw(small),
            draw(st.integers(0, 6)),
            draw(small),
            draw(st.integers(0, 9)),
            draw(small),
            draw(st.tuples(*[st.integers(0, 5).map(float)] * num_types)),
        )
        for index in range(count)
    )
    flows = []
    for producer in range(count - 1):
        later = st.integers(producer + 1, count - 1)
        consumers = draw(st.sets(later, min_size=draw(st.integers(0, 1)), max_size=3))
        if consumers:
            size = draw(st.integers(1, 12))
            gradient = draw(st.sampled_from((0, size)))
            flows.append(Flow(producer, tuple(sorted(consumers)), size, gradient))
    shared = []
    for index in range(draw(st.integers(0, 2))):
        users = draw(st.sets(st.integers(0, count - 1), min_size=2, max_size=3))
        tied = draw(st.booleans())
        shared.append(
            Shared(
                f"p{index}",
                tuple(sorted(users)),
                (0.0 if tied else 3.0,) * num_types,
                draw(small),
                0 if tied else draw(st.integers(0, 4)),
                0,
                4 if tied else 0,
                0,
                (2.0 if tied else 0.0,) * num_types,
                draw(st.integers(1, 9)) if tied else 0,
            )
        )
    num_classes = draw(st.integers(num_types, min(3, devices)))
    sizes = [1] * num_classes
    for _ in range(devices - num_classes):
        sizes[draw(st.integers(0, num_classes - 1))] += 1
    heap = iter(range(devices))
    classes = tuple(
        DeviceClass(
            index if index < num_types else draw(st.integers(0, num_types - 1)),
            draw(st.integers(40, 250)),
            tuple(next(heap) for _ in range(size)),
        )
        for index, size in enumerate(sizes)
    )
    fast = Link(draw(st.sampled_from((0.0, 0.5))), float(draw(st.integers(2, 8))))
    slow = Link(draw(st.sampled_from((0.5, 1.0))), float(draw(st.integers(1, 2))))
    apart = draw(st.sampled_from((fast, slow)))
    links = tuple(
        tuple(fast if a == b else apart for b in range(num_classes)) for a in range(num_classes)
    )
    return StageProblem(
        units,
        tuple(flows),
        tuple(shared),
        classes,
        links,
        slow,
        draw(st.integers(1, 6)),
        draw(st.sampled_from(("1f1b", "gpipe", "forward"))),
        overlap=draw(st.sampled_from((Overlap(), Overlap(0.25, 0.5), Overlap(0.0)))),
        held=draw(st.sampled_from((Link(0.0, math.inf), Link(0.5, 4.0)))),
    )


@st.composite
def problems_with_sums(draw: st.DrawFn) -> StageProblem:
    """As `problems`; gradients are summed over ranks, once a step or once a microbatch."""
    problem = draw(problems())
    return replace(problem, units=tuple(draw(_with_sums(unit)) for unit in problem.units))


@st.composite
def _with_sums(draw: st.DrawFn, unit: Unit) -> Unit:
    """`unit` with gradients that are summed over ranks, once a step or once a microbatch."""
    amount = st.integers(0, 9).map(float)
    share = draw(st.sampled_from((0.0, 0.5, 1.0)))
    weights = tuple(share * seconds for seconds in unit.backward_seconds)
    return replace(
        unit, weight_seconds=weights, sum_seconds=draw(amount), early_seconds=draw(amount)
    )
