"""One device type that stands for several which wait for each other."""

from __future__ import annotations

from collections.abc import Sequence

from ..compiler.ir.cluster import Cluster, DeviceType, OpCost, RateCurve

__all__ = ["slowest_type"]


def slowest_type(cluster: Cluster, devices: Sequence[int]) -> DeviceType:
    """The type of `devices`; of several types one that is as slow as the slowest in everything, as
    parts are equal and ranks wait for each other."""
    kinds = list(dict.fromkeys(cluster.type_of(device) for device in devices))
    if len(kinds) == 1:
        return kinds[0]
    dtypes = dict.fromkeys(name for kind in kinds for name, _ in kind.flops_per_second)
    rates = [dict(kind.flops_per_second) for kind in kinds]
    return DeviceType(
        name="+".join(kind.name for kind in kinds),
        backend=kinds[0].backend,
        memory_bytes=min(kind.memory_bytes for kind in kinds),
        memory_bytes_per_second=min(kind.memory_bytes_per_second for kind in kinds),
        flops_per_second=tuple(
            (name, min(table.get(name, table.get("f32", min(table.values()))) for table in rates))
            for name in dtypes
        ),
        overhead_seconds=max(kind.overhead_seconds for kind in kinds),
        unsupported_ops=tuple(dict.fromkeys(op for kind in kinds for op in kind.unsupported_ops)),
        instruction_seconds=max(kind.instruction_seconds for kind in kinds),
        message_seconds=max(kind.message_seconds for kind in kinds),
        curves=_slowest_curves(kinds),
        op_costs=_dearest_costs(kinds),
    )


def _slowest_curves(kinds: Sequence[DeviceType]) -> tuple[RateCurve, ...]:
    """Curves that all types have, at the sizes of all."""
    found = []
    for first in kinds[0].curves:
        curves = [kind.curve(first.kind, first.dtype) for kind in kinds]
        known = [curve for curve in curves if curve is not None]
        if len(known) == len(kinds):
            sizes = sorted({size for curve in known for size, _ in curve.points})
            points = tuple((size, min(curve.at(size) for curve in known)) for size in sizes)
            found.append(RateCurve(first.kind, first.dtype, points))
    return tuple(found)


def _dearest_costs(kinds: Sequence[DeviceType]) -> tuple[OpCost, ...]:
    """Costs of the kinds of operators that all types have, at the sizes of all."""
    tables = [
        {(cost.name, cost.phase, cost.dtype): cost for cost in kind.op_costs} for kind in kinds
    ]
    found = []
    for key in tables[0]:
        if all(key in table for table in tables):
            pairs = [(kind, table[key]) for kind, table in zip(kinds, tables, strict=True)]
            sizes = sorted({size for _, cost in pairs for size, _ in cost.points})
            points = tuple(
                (size, min(kind.op_rate(cost, size) for kind, cost in pairs)) for size in sizes
            )
            name, phase, dtype = key
            kernels = max(cost.kernels for _, cost in pairs)
            found.append(OpCost(name, phase, kernels, points, dtype))
    return tuple(found)
