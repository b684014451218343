"""The parts of a cluster file that calibration writes: rates by size, costs of kinds of operators,
and what links do beside single messages."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

from ..compiler.ir.cluster import COLLECTIVES, CURVES, HANDLED, Link, OpCost, RateCurve
from ..compiler.ir.errors import ClusterError
from ..compiler.ir.types import DTYPES_BY_NAME
from .cluster_fields import (
    BANDWIDTHS,
    BYTES,
    FLOPS,
    RATES,
    TIMES,
    Source,
    as_table,
    check_keys,
    number,
    quantity,
    quantity_of,
)

__all__ = ["check_dtype", "collective_links", "curves", "handling_links", "link_of", "op_costs"]

_CURVE_KEYS = tuple((kind, f"{kind}_rates") for kind in CURVES if kind != "memory")


@dataclass(frozen=True, slots=True)
class _Units:
    size: dict[str, float]
    rate: dict[str, float]
    example: str


_OF_PRODUCTS = _Units(FLOPS, RATES, '[["1 MFLOP", "20 GFLOP/s"], ["1 GFLOP", "60 GFLOP/s"]]')
_OF_MEMORY = _Units(BYTES, BANDWIDTHS, '[["64 KiB", "20 GB/s"], ["64 MiB", "8 GB/s"]]')


def curves(table: Mapping[str, object], name: str, source: Source) -> tuple[RateCurve, ...]:
    """The rates by size of device type `name`."""
    return tuple(_curves(table, name, source))


def _curves(table: Mapping[str, object], name: str, source: Source) -> Iterator[RateCurve]:
    for kind, key in _CURVE_KEYS:
        if key in table:
            by_dtype = as_table(table[key], "rates", source, (name, key))
            for dtype, raw in by_dtype.items():
                check_dtype(dtype, f"{key} of {name!r}", source, (name, key))
                points = _points(raw, _OF_PRODUCTS, source, (name, key, dtype))
                yield RateCurve(kind, dtype, points)
    key = "memory_bandwidths"
    if key in table:
        yield RateCurve("memory", "", _points(table[key], _OF_MEMORY, source, (name, key)))


def check_dtype(dtype: str, among: str, source: Source, place: tuple[str, ...]) -> None:
    """Refuse what is no dtype."""
    if dtype not in DTYPES_BY_NAME:
        raise ClusterError(
            f"unknown dtype {dtype!r} among the {among}",
            where=source.where(*place, dtype),
            ways_out=(f"one of: {', '.join(DTYPES_BY_NAME)}",),
        )


def _points(
    raw: object, units: _Units, source: Source, place: tuple[str, ...]
) -> tuple[tuple[float, float], ...]:
    ways_out = (f"write pairs of size and rate, for example {units.example}",)
    pairs = raw if isinstance(raw, list) else []
    if not pairs or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise ClusterError(
            f"{'.'.join(place)} is not a list of pairs",
            where=source.where(*place),
            ways_out=ways_out,
        )
    points = tuple(
        (
            quantity_of(size, units.size, source, place),
            quantity_of(rate, units.rate, source, (*place, str(size))),
        )
        for size, rate in pairs
    )
    for place_, ((low, _), (high, _)) in enumerate(pairwise(points), 1):
        if low >= high:
            size = pairs[place_][0]
            raise ClusterError(
                f"the sizes of {'.'.join(place)} do not ascend: {size!r} follows "
                f"{pairs[place_ - 1][0]!r}",
                where=source.where(*place, str(size)),
                ways_out=("order the pairs by size, each size once",),
            )
    return points


def op_costs(table: Mapping[str, object], name: str, source: Source) -> tuple[OpCost, ...]:
    """The costs of kinds of operators on device type `name`."""
    if "op_costs" not in table:
        return ()
    found: list[OpCost] = []
    costs = as_table(table["op_costs"], "op_costs", source, (name, "op_costs"))
    for kind, raw in costs.items():
        place = (name, "op_costs", kind)
        by_key = as_table(raw, "op_cost", source, place)
        own = {key: body for key, body in by_key.items() if key in DTYPES_BY_NAME}
        shared = {key: body for key, body in by_key.items() if key not in own}
        found += _phase_costs(kind, "", shared, source, place)
        for dtype, body in own.items():
            inner = (*place, dtype)
            phases = as_table(body, "op_cost", source, inner)
            found += _phase_costs(kind, dtype, phases, source, inner)
    return tuple(found)


def _phase_costs(
    kind: str, dtype: str, phases: dict[str, object], source: Source, place: tuple[str, ...]
) -> Iterator[OpCost]:
    check_keys(phases, "op_cost", source, place)
    for phase, figures in phases.items():
        inner = (*place, phase)
        body = as_table(figures, "phase", source, inner)
        check_keys(body, "phase", source, inner)
        kernels = number(body, "kernels", source, inner)
        rates = body.get("rates", [])
        points = _points(rates, _OF_MEMORY, source, (*inner, "rates")) if rates else ()
        yield OpCost(kind, phase, kernels, points, dtype)


def link_of(table: Mapping[str, object], source: Source, place: tuple[str, ...]) -> Link:
    """Latency and bandwidth in `table`."""
    return Link(
        quantity(table, "latency", TIMES, source, place, allow_zero=True),
        quantity(table, "bandwidth", BANDWIDTHS, source, place),
    )


def collective_links(
    table: Mapping[str, object], source: Source, place: tuple[str, ...]
) -> tuple[tuple[str, Link], ...]:
    """The collectives for which the link in `table` has figures of their own."""
    return _named_links(COLLECTIVES, table, source, place)


def handling_links(
    table: Mapping[str, object], source: Source, place: tuple[str, ...]
) -> tuple[tuple[str, Link], ...]:
    """What collectives over the link in `table` take of computation."""
    if "handling" not in table:
        return ()
    place = (*place, "handling")
    body = as_table(table["handling"], "handling", source, place)
    check_keys(body, "handling", source, place)
    return _named_links(HANDLED, body, source, place)


def _named_links(
    names: Iterable[str], table: Mapping[str, object], source: Source, place: tuple[str, ...]
) -> tuple[tuple[str, Link], ...]:
    found = []
    for name in names:
        if name in table:
            body = as_table(table[name], "collective", source, (*place, name))
            check_keys(body, "collective", source, (*place, name))
            found.append((name, link_of(body, source, (*place, name))))
    return tuple(found)
