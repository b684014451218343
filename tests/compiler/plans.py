"""Plans made by hand, for tests of what shows or exports plans."""

from __future__ import annotations

from cutset.compiler.ir.cluster import Cluster, Device, DeviceType, Link, LinkRule
from cutset.compiler.ir.graph import Graph
from cutset.compiler.ir.mesh import Mesh, MeshAxis
from cutset.compiler.ir.plan import (
    Certificate,
    Fingerprint,
    MemoryPrediction,
    OptimizerModel,
    Plan,
    Prediction,
    Stage,
)
from cutset.compiler.ir.schedule import Schedule

__all__ = ["MIB", "cluster", "plan_of"]

MIB = 1 << 20

ONE_F_ONE_B = """
schedule 1f1b stages=2 microbatches=2
0: F0.0 F0.1 B0.0 B0.1
1: F1.0 B1.0 F1.1 B1.1
"""


def cluster(num_devices: int = 2) -> Cluster:
    """CPU devices of 64 MiB on one node."""
    kind = DeviceType("cpu-core", "cpu", 64 * MIB, 1e10, (("f32", 1e10),))
    devices = tuple(Device(index, "cpu-core", "host") for index in range(num_devices))
    return Cluster("hand", (kind,), devices, (LinkRule(Link(1e-5, 1e9)),), local=True)


def plan_of(graph: Graph, *stages: tuple[int, ...]) -> Plan:
    """A two-stage 1F1B plan with made-up figures; stage s holds `stages[s]` on device s."""
    memory = tuple(
        MemoryPrediction(device, 4 * MIB, 4 * MIB, 8 * MIB, 10 * MIB, 3 * MIB, 1 * MIB)
        for device in range(len(stages))
    )
    return Plan(
        fingerprint=Fingerprint("Mlp", "a" * 64, "b" * 64, 1_250_000, 5_000_000),
        cluster=cluster(len(stages)),
        mode=graph.mode,
        batch_size=8,
        optimizer=OptimizerModel("AdamW", 2.0),
        num_microbatches=2,
        mesh=Mesh((MeshAxis("pipeline", len(stages)),)),
        stages=tuple(Stage(index, (index,), nodes) for index, nodes in enumerate(stages)),
        schedule=Schedule.parse(ONE_F_ONE_B),
        prediction=Prediction(0.012, 0.25, (0.001, 0.002), (0.002, 0.004), memory),
        certificate=Certificate(0.012, 0.0119, 0.00833, "all contiguous cuts", "cp-sat 9.15", 0.4),
        warnings=("op aten.foo.default is priced by its bytes",),
    )
