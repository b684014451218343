"""Throughput placement as its callers see it: errors, repeatability, progress, large graphs."""

from __future__ import annotations

import random
import time

import pytest

from cutset.compiler.ir.errors import InfeasibleError
from cutset.compiler.ir.workload import DeviceKind, Operator, Workload
from cutset.cost_models.placement import contiguity_breaks, device_loads, violations
from cutset.passes.placement.throughput import place_throughput

CPU, ACCELERATOR = DeviceKind("cpu", 1), DeviceKind("accelerator", 2, memory=100.0)


def chain(
    times: list[tuple[float | None, ...]],
    kinds: tuple[DeviceKind, ...],
    *,
    sizes: list[float] | None = None,
    colours: list[str | None] | None = None,
) -> Workload:
    operators = tuple(
        Operator(
            f"v{v}",
            time,
            (0.1,) * len(kinds),
            size=sizes[v] if sizes else 0.0,
            colour=colours[v] if colours else None,
        )
        for v, time in enumerate(times)
    )
    return Workload(kinds, operators, tuple((v, v + 1) for v in range(len(times) - 1)))


def layered(count: int, num_devices: int, *, seed: int, width: int = 16) -> Workload:
    """Layers of random width; an operator reads one to three of the layer before."""
    rng = random.Random(seed)
    layers: list[list[int]] = [[0]]
    edges = set()
    for v in range(1, count):
        if len(layers[-1]) >= rng.randint(1, width):
            layers.append([])
        layers[-1].append(v)
    for before, after in zip(layers, layers[1:], strict=False):
        for v in after:
            edges |= {(u, v) for u in rng.sample(before, min(len(before), rng.randint(1, 3)))}
    operators = []
    for v in range(count):
        time = rng.expovariate(1)
        operators.append(
            Operator(f"v{v}", (10 * time, time), (0.0, rng.expovariate(5)), size=rng.randint(0, 9))
        )
    kinds = (CPU, DeviceKind("accelerator", num_devices, memory=6.0 * count / num_devices))
    return Workload(kinds, tuple(operators), tuple(sorted(edges)))


@pytest.mark.parametrize("contiguous", [True, False])
class TestInfeasible:
    def refused(self, workload: Workload, contiguous: bool) -> str:
        with pytest.raises(InfeasibleError) as caught:
            place_throughput(workload, contiguous=contiguous, time_limit=10, gap=0.01)
        assert caught.value.ways_out
        return str(caught.value)

    def test_a_colour_that_no_device_supports(self, contiguous: bool) -> None:
        workload = chain([(1.0, None), (None, 1.0)], (CPU, ACCELERATOR), colours=["red", "red"])
        text = self.refused(workload, contiguous)
        assert "'v0', 'v1' that must share a device" in text
        assert "cpu does not support 'v1'" in text
        assert "accelerator does not support 'v0'" in text

    def test_an_operator_larger_than_every_memory(self, contiguous: bool) -> None:
        workload = chain([(1.0,), (1.0,)], (ACCELERATOR,), sizes=[120.0, 1.0])
        text = self.refused(workload, contiguous)
        assert "'v0', 120 bytes" in text and "accelerator holds 100 bytes" in text

    def test_too_little_memory_in_total(self, contiguous: bool) -> None:
        workload = chain([(1.0,)] * 3, (ACCELERATOR,), sizes=[70.0, 70.0, 70.0])
        text = self.refused(workload, contiguous)
        assert "hold 210 bytes" in text and "2 accelerator of 100" in text

    def test_too_little_memory_of_the_kinds_that_support_it(self, contiguous: bool) -> None:
        times: list[tuple[float | None, ...]] = [(None, 1.0)] * 3
        workload = chain(times, (CPU, ACCELERATOR), sizes=[70.0, 70.0, 70.0])
        assert "hold 210 bytes" in self.refused(workload, contiguous)

    def test_memory_that_suffices_but_cannot_be_divided(self, contiguous: bool) -> None:
        workload = chain([(1.0,)] * 3, (ACCELERATOR,), sizes=[60.0, 60.0, 60.0])
        assert "180 bytes of operators in 3 inseparable groups" in self.refused(
            workload, contiguous
        )


def test_colours_can_make_only_the_contiguous_problem_infeasible() -> None:
    workload = chain([(1.0,)] * 3, (ACCELERATOR,), sizes=[60.0, 50.0, 1.0], colours=["a", "b", "a"])
    free = place_throughput(workload, contiguous=False, time_limit=10, gap=0.0)
    assert not violations(workload, free.placement)
    with pytest.raises(InfeasibleError, match="'v0', 'v1', 'v2' that must share a device"):
        place_throughput(workload, contiguous=True, time_limit=10, gap=0.0)


@pytest.mark.parametrize("contiguous", [True, False])
def test_is_repeatable_and_tells_of_progress(contiguous: bool) -> None:
    workload = layered(30, 2, seed=1)
    told: list[tuple[float, float]] = []
    first, second = (
        place_throughput(
            workload,
            contiguous=contiguous,
            time_limit=60,
            gap=0.04,
            progress=lambda value, bound: told.append((value, bound)),
        )
        for _ in range(2)
    )
    assert (first.placement, first.value, first.lower_bound, first.method) == (
        second.placement,
        second.value,
        second.lower_bound,
        second.method,
    )
    assert 0 <= first.gap <= 0.04
    half = told[: len(told) // 2]
    assert half[-1] == (first.value, first.lower_bound)
    assert told == half * 2
    assert all(a[0] >= b[0] and a[1] <= b[1] for a, b in zip(half, half[1:], strict=False))


@pytest.mark.parametrize(
    ("count", "num_devices", "seconds", "gap"), [(25, 2, 20.0, 0.05), (150, 4, 1.5, 0.0)]
)
def test_free_is_never_worse_than_contiguous(
    count: int, num_devices: int, seconds: float, gap: float
) -> None:
    """Also where time is too short for either search to end by itself."""
    for seed in range(4):
        workload = layered(count, num_devices, seed=seed)
        pieces, free = (
            place_throughput(workload, contiguous=contiguous, time_limit=seconds, gap=gap)
            for contiguous in (True, False)
        )
        assert free.value <= pieces.value
        assert not contiguity_breaks(workload, pieces.placement)


def test_no_work_at_all_is_placed_at_no_load() -> None:
    workload = chain([(0.0,)] * 3, (DeviceKind("accelerator", 1),))
    result = place_throughput(workload, contiguous=True, time_limit=5, gap=0.0)
    assert (result.value, result.lower_bound, result.gap) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("count", "num_devices", "seconds"),
    [(1000, 16, 6), pytest.param(20_000, 64, 80, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("contiguous", [True, False])
def test_large_graphs_are_placed_within_the_time_limit(
    count: int, num_devices: int, seconds: float, contiguous: bool
) -> None:
    workload = layered(count, num_devices, seed=0)
    begin = time.monotonic()
    result = place_throughput(workload, contiguous=contiguous, time_limit=seconds, gap=0.01)
    assert time.monotonic() - begin < 1.5 * seconds
    assert not violations(workload, result.placement)
    assert not contiguous or not contiguity_breaks(workload, result.placement)
    assert result.value == max(load.total for load in device_loads(workload, result.placement))
    assert result.gap < 0.15
