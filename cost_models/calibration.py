"""From measured times to the figures of a device type and of links.

Pure functions: what was measured goes in, figures with their quality come out. Every figure is
rounded to four digits, as no measurement has more.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from ..compiler.ir.cluster import CURVES, PHASES, DeviceType, Link, OpCost, RateCurve
from .fits import Quality, Sample, fit_link, left_out, rates_by_size

__all__ = [
    "Beside",
    "OpTime",
    "calls",
    "collective_sample",
    "fitted_curve",
    "fitted_link",
    "fitted_op_costs",
    "fitted_optimizer",
    "overlap_shares",
    "rounded",
    "seconds_of_all",
    "skew_seconds",
    "streams",
    "with_curves",
]

Points = tuple[tuple[float, float], ...]

_DIGITS = 4
_ALL_STREAMS = 0.9  # of the messages at once: as many as there may be
_LEAST_HUNDREDTHS = 2  # of shares that are above zero
_MOST_SHARE = 0.9  # of a device's rate, taken by transfers at the speed that they keep
_ERROR_DIGITS = 9
_STEPS = {"all_reduce": 2}  # rings that go round twice


def rounded(value: float) -> float:
    """`value` to four digits."""
    return float(f"{value:.{_DIGITS}g}")


@dataclass(frozen=True, slots=True)
class OpTime:
    """One operator as it was measured, as part of a stage.

    Args:
        name: of its cost (`norm`).
        phase: one of `PHASES`.
        num_bytes: that the cost model counts of it.
        seconds: measured.
        dtype: as of `OpCost`.
    """

    name: str
    phase: str
    num_bytes: float
    seconds: float
    dtype: str = ""


def calls(one_seconds: float, many_seconds: float, count: int) -> tuple[float, float]:
    """Overhead of an operator, and of the call of a kernel around them, from stages of one and of
    `count` operators with next to nothing to do."""
    overhead = max((many_seconds - one_seconds) / (count - 1), 0.1 * many_seconds / count)
    return rounded(overhead), rounded(max(one_seconds - overhead, 0.0))


def fitted_curve(
    kind: str, dtype: str, samples: Sequence[tuple[float, float]], overhead_seconds: float
) -> tuple[RateCurve, Quality]:
    """The rate by size from (size, seconds of one operator), and how well it predicts sizes that
    were left out."""
    curve = RateCurve(kind, dtype, _rounded(rates_by_size(samples, overhead_seconds)))
    return curve, left_out(samples, overhead_seconds, f"{kind} {dtype}".rstrip())


def _rounded(points: Points) -> Points:
    return tuple((rounded(size), rounded(rate)) for size, rate in points)


def with_curves(base: DeviceType, curves: Iterable[RateCurve]) -> DeviceType:
    """`base` with `curves`, and with their ends as its sustained rates; element types without a
    curve keep theirs."""
    found = tuple(sorted(curves, key=lambda curve: CURVES.index(curve.kind)))
    rates = dict(base.flops_per_second) | {
        curve.dtype: max(rate for _, rate in curve.points)
        for curve in found
        if curve.kind == "matmul"
    }
    memory = next((curve for curve in found if curve.kind == "memory"), None)
    return replace(
        base,
        curves=found,
        flops_per_second=tuple(rates.items()),
        memory_bytes_per_second=(
            base.memory_bytes_per_second if memory is None else memory.points[-1][1]
        ),
    )


def fitted_op_costs(
    kind: DeviceType, times: Sequence[OpTime]
) -> tuple[tuple[OpCost, ...], tuple[Quality, ...]]:
    """Costs of all names in `times` on `kind`, whose overhead and memory rates are known.

    The smallest size of each tells how many kernels it is; its work is next to nothing. What draws
    random numbers was measured as a dropout called `random`: its cost is what it takes beside an
    elementwise operator.
    """
    costs: dict[tuple[str, str, str], OpCost] = {}
    qualities = []
    for key in dict.fromkeys((item.name, item.phase, item.dtype) for item in times):
        own = [(t.num_bytes, t.seconds) for t in times if (t.name, t.phase, t.dtype) == key]
        name, phase, dtype = key
        elementwise = costs.get(("elementwise", PHASES[0], dtype))
        if name == "random" and phase != PHASES[0]:
            key = "dropout", phase, dtype
        elif name == "random" and elementwise is not None:
            own = [(n, max(t - _seconds(kind, elementwise, n), 0.1 * t)) for n, t in own]
        costs[key], quality = _op_cost(kind, key, sorted(own))
        qualities.append(quality)
    names = list(dict.fromkeys(cost.name for cost in costs.values()))
    in_order = sorted(costs.values(), key=lambda cost: names.index(cost.name))  # as files have them
    return tuple(in_order), tuple(qualities)


def _seconds(kind: DeviceType, cost: OpCost, num_bytes: float) -> float:
    return cost.kernels * kind.overhead_seconds + num_bytes / kind.op_rate(cost, num_bytes)


def _op_cost(
    kind: DeviceType, key: tuple[str, str, str], samples: Sequence[tuple[float, float]]
) -> tuple[OpCost, Quality]:
    name, phase, dtype = key
    kernels = rounded(samples[0][1] / kind.overhead_seconds)
    fixed = kernels * kind.overhead_seconds
    points = _rounded(rates_by_size(samples[1:] or samples, fixed))
    quality = left_out(samples, fixed, " ".join(filter(None, key)))
    return OpCost(name, phase, kernels, points, dtype), quality


def fitted_optimizer(
    kind: DeviceType, name: str, samples: Sequence[tuple[float, float]]
) -> tuple[OpCost, Quality]:
    """Cost of the update of one tensor by optimizer `name`, from (bytes that it moves, seconds)."""
    return _op_cost(kind, (name, PHASES[0], ""), tuple(sorted(samples)))


# -- links -----------------------------------------------------------------------------------------


def collective_sample(name: str, num_ranks: int, num_bytes: float, seconds: float) -> Sample:
    """A collective over the whole of `num_bytes` as steps of a ring."""
    steps = float(_STEPS.get(name, 1) * (num_ranks - 1))
    return Sample(steps, steps * num_bytes / num_ranks, seconds)


def fitted_link(samples: Sequence[Sample], name: str) -> tuple[Link, Quality]:
    """Latency and bandwidth of one message or one ring step."""
    link, quality = fit_link(samples, name)
    return Link(rounded(link.latency_seconds), rounded(link.bytes_per_second)), quality


def streams(alone_seconds: float, together_seconds: float, count: int) -> float | None:
    """How many messages go at once at full bandwidth, from the time of one alone and of `count` at
    once; None: all of them."""
    found = count * alone_seconds / together_seconds
    return None if found >= _ALL_STREAMS * count else rounded(found)


@dataclass(frozen=True, slots=True)
class Beside:
    """Transfers and a computation on one device, each alone and both started together.

    Args:
        transfers, computing: seconds of either alone.
        computed, over: seconds until the computation is done beside the transfers, and both are.
    """

    transfers: float
    computing: float
    computed: float
    over: float


def overlap_shares(measured: Sequence[Beside]) -> tuple[float, float]:
    """The share of a device's rate that transfers at full speed take from computation, and the
    share of their speed that they keep beside it (`overlap.py`).

    Of all pairs in steps of a hundredth, the one that predicts both ends of what was measured
    with the least sum of errors, relative to transfers and computation one after the other. Where
    several do, transfers keep the most, and take the least.
    """
    if not measured:
        return 0.0, 1.0
    hundredths = range(_LEAST_HUNDREDTHS, 101)
    shares = [
        (taken / 100, kept / 100)
        for kept in reversed(hundredths)
        for taken in (0, *hundredths)
        if taken * kept <= _MOST_SHARE * 100 * 100
    ]
    return min(shares, key=lambda pair: round(_overlap_error(measured, *pair), _ERROR_DIGITS))


def _overlap_error(measured: Sequence[Beside], taken: float, kept: float) -> float:
    """Sum of the relative errors of what `overlap_shares` says."""
    total = 0.0
    for one in measured:
        computed = one.computing / (1.0 - taken * kept)
        if kept * computed >= one.transfers:  # they are over first
            computed = over = one.computing + taken * one.transfers
        else:
            over = computed + one.transfers - kept * computed
        error = abs(computed - one.computed) + abs(over - one.over)
        total += error / (one.transfers + one.computing)
    return total


def seconds_of_all(times: Sequence[tuple[float, float]], *, shared: bool) -> float:
    """Seconds of a collective from when the last rank has reached it, in the mean over ranks.

    Args:
        times: when each rank reached it and when it was over there.
        shared: whether by one clock; if not, it is over everywhere when it is for the last rank.
    """
    if not shared:
        return min(end - begin for begin, end in times)
    return max(statistics.fmean(end for _, end in times) - max(begin for begin, _ in times), 0.0)


def skew_seconds(late: Sequence[float]) -> float:
    """How much later than the mean the last rank reaches a collective.

    Args:
        late: seconds, of collectives of every kind and size.
    """
    return rounded(max(statistics.median(late), 0.0)) if late else 0.0
