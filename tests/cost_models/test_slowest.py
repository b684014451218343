from __future__ import annotations

from cutset.compiler.ir.cluster import (
    Cluster,
    Device,
    DeviceType,
    Link,
    LinkRule,
    OpCost,
    RateCurve,
)
from cutset.cost_models.slowest import slowest_type

QUICK = DeviceType(
    "quick",
    "cpu",
    1 << 30,
    8e9,
    (("f32", 4e9), ("bf16", 8e9)),
    1e-6,
    instruction_seconds=1e-5,
    curves=(RateCurve("memory", "", ((1e3, 4e9), (1e5, 2e9))),),
    op_costs=(
        OpCost("gelu", "forward", 2.0, ((1e3, 5e9),)),
        OpCost("gelu", "forward", 3.0, (), "bf16"),
        OpCost("norm", "forward", 2.0),
    ),
)
LAME = DeviceType(
    "lame",
    "cpu",
    1 << 20,
    9e9,
    (("f32", 1e9),),
    2e-6,
    ("aten.sort.default",),
    instruction_seconds=2e-5,
    curves=(RateCurve("memory", "", ((1e4, 3e9),)), RateCurve("matmul", "f32", ((1e6, 1e9),))),
    op_costs=(OpCost("gelu", "forward", 1.0),),
)


def cluster(*kinds: DeviceType) -> Cluster:
    devices = tuple(Device(index, kind.name, "here") for index, kind in enumerate(kinds))
    return Cluster("test", tuple(dict.fromkeys(kinds)), devices, (LinkRule(Link(0.0, 1e9)),))


def test_one_type_is_itself() -> None:
    assert slowest_type(cluster(QUICK, QUICK), (0, 1)) is QUICK


def test_of_two_types_the_worse_figure_counts_each_time() -> None:
    both = slowest_type(cluster(QUICK, LAME), (0, 1))
    assert both.memory_bytes == 1 << 20 and both.memory_bytes_per_second == 8e9
    assert both.flops_per_second == (("f32", 1e9), ("bf16", 1e9))
    assert (both.overhead_seconds, both.instruction_seconds) == (2e-6, 2e-5)
    assert both.unsupported_ops == ("aten.sort.default",)
    assert both.op_costs == (OpCost("gelu", "forward", 2.0, ((1e3, 3e9),)),)
    (memory,) = both.curves
    assert [size for size, _ in memory.points] == [1e3, 1e4, 1e5]
    assert memory.at(1e3) == 3e9 and memory.at(1e5) == 2e9
