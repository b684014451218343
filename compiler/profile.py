"""Measure the operators of a captured graph on the devices that are to run it.

One worker for each device, all at the same time, as they will run. Where devices are of one type
the mean of their figures counts.
"""

from __future__ import annotations

import statistics

from ..runtime.session import LocalSession
from .capture import Captured
from .codegen.cut import cut_stages
from .codegen.python import emit_python
from .ir.cluster import Cluster
from .ir.errors import UsageError
from .ir.plan import Stage
from .ir.program import Program
from .ir.text import print_program
from .ranks import start_workers

__all__ = ["measure_nodes"]

_FACTORY = "cutset.runtime.profiler:Profiler"
_REPEATS = 7
_TIMEOUT_SECONDS = 300.0


def measure_nodes(captured: Captured, cluster: Cluster) -> dict[str, tuple[float, ...]]:
    """Seconds of every node of the graph, by name of device type.

    Raises:
        UsageError: the devices are not those of this machine.
        RuntimeFailure: a worker failed.
    """
    if not cluster.local:
        raise UsageError(
            f"cluster {cluster.name!r} is not this machine: its devices cannot be measured",
            where="profile",
            ways_out=("pass profile='model'", "mark the cluster with local = true if it is"),
        )
    program = _program(captured)
    arguments = {
        "program": print_program(program),
        "source": emit_python(program),
        "repeats": _REPEATS,
    }
    session: LocalSession = start_workers(
        cluster, len(cluster.devices), timeout_seconds=_TIMEOUT_SECONDS, factory=_FACTORY
    )
    try:
        rows = session.call("time_nodes", arguments, timeout_seconds=_TIMEOUT_SECONDS)
    finally:
        session.close()
    by_type: dict[str, list[list[float]]] = {}
    for device, row in zip(cluster.devices, rows, strict=True):
        by_type.setdefault(device.type, []).append(row)
    return {
        name: tuple(statistics.mean(column) for column in zip(*found, strict=True))
        for name, found in by_type.items()
    }


def _program(captured: Captured) -> Program:
    """One node a stage, all on one rank."""
    graph = captured.graph
    stages = cut_stages(graph, tuple(Stage(n.id, (0,), (n.id,)) for n in graph.nodes))
    return Program(
        rank=0,
        num_ranks=1,
        mode=graph.mode,
        num_microbatches=1,
        stages=stages,
        stage_ranks=(0,) * len(stages),
        instructions=(),
        plan_hash="",
        memory_limit_bytes=0,
    )
