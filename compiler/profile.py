"""Measure the operators of a captured graph, and messages, on the devices that are to run it.

One worker for each device, all at the same time, as they will run. Where devices are of one type
the mean of their figures counts.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable

from ..passes.context import Measured
from .capture import Captured
from .codegen.cut import cut_stages
from .codegen.python import emit_python
from .ir.cluster import Cluster, Link
from .ir.errors import WorkerLost
from .ir.plan import Stage
from .ir.program import Program
from .ir.text import print_program
from .ranks import check_measurable, profiling_session
from .turns import measuring_turn

__all__ = ["measure"]

_REPEATS = 7
_TIMEOUT_SECONDS = 300.0


def measure(
    captured: Captured, cluster: Cluster, say: Callable[[str], None]
) -> tuple[Measured | None, str]:
    """Seconds of every node of the graph, and of messages; None and why, if the memory of a device
    does not suffice.

    Args:
        say: is told if another measurement has to end first.

    Raises:
        UsageError: the devices are not those of this machine.
        RuntimeFailure: a worker failed.
    """
    check_measurable(cluster)
    program = _program(captured)
    arguments = {
        "program": print_program(program),
        "source": emit_python(program),
        "repeats": _REPEATS,
    }
    with measuring_turn(say):
        session = profiling_session(cluster, timeout_seconds=_TIMEOUT_SECONDS)
        try:
            nodes = session.call("time_nodes", arguments, timeout_seconds=_TIMEOUT_SECONDS)
            messages = session.call("time_messages", timeout_seconds=_TIMEOUT_SECONDS)
        except WorkerLost as error:
            return None, error.cause.partition(";")[0]
        finally:
            session.close()
    for rank, row in enumerate(nodes):
        if isinstance(row, str):
            return None, f"rank {rank}, {row}"
    links = {
        name: Link(latency, 1.0 / per_byte if per_byte > 0 else math.inf)
        for name, (latency, per_byte) in _by_type(cluster, messages).items()
    }
    return Measured(_by_type(cluster, nodes), links), ""


def _by_type(cluster: Cluster, rows: list[list[float]]) -> dict[str, tuple[float, ...]]:
    """Means over the devices of each type."""
    found: dict[str, list[list[float]]] = {}
    for device, row in zip(cluster.devices, rows, strict=True):
        found.setdefault(device.type, []).append(row)
    return {
        name: tuple(map(statistics.mean, zip(*own, strict=True))) for name, own in found.items()
    }


def _program(captured: Captured) -> Program:
    """One node a stage, all on one rank."""
    graph = captured.graph
    stages = cut_stages(graph, tuple(Stage(n.id, (0,), (n.id,)) for n in graph.nodes))
    return Program.unscheduled(graph.mode, stages)
