"""Plans whose operators lie where a test wants them, with devices that differ."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from torch import nn

from cutset.compiler.ir.cluster import Cluster, Device, DeviceType, Link, LinkRule
from cutset.compiler.ir.fingerprint import fingerprint
from cutset.compiler.ir.graph import Graph, Mode
from cutset.compiler.ir.plan import Objective, Plan
from cutset.compiler.planning import Planning
from cutset.passes.context import Context, PlanOptions
from cutset.passes.place import place_by_hand
from cutset.passes.placement.from_graph import PlacementStatement, state_workload

__all__ = ["cpu_type", "cpu_workers", "placed_by", "scattered"]

Choose = Callable[[PlacementStatement], list[int]]


def cpu_type(name: str, rate: float = 1e10, **fields: Any) -> DeviceType:
    """A CPU worker with one thread."""
    chosen = {"memory_bytes": 1 << 30, "threads": 1} | fields
    return DeviceType(
        name,
        "cpu",
        memory_bytes_per_second=rate,
        flops_per_second=(("f32", rate), ("f64", rate / 2)),
        overhead_seconds=5e-6,
        **chosen,
    )


def cpu_workers(*types: DeviceType) -> Cluster:
    """One worker of each of `types` on this machine."""
    devices = tuple(Device(index, entry.name, "host") for index, entry in enumerate(types))
    rules = (LinkRule(Link(1e-5, 2e9)),)
    return Cluster("workers", tuple(dict.fromkeys(types)), devices, rules, local=True)


def placed_by(
    choose: Choose,
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    cluster: Cluster,
    num_microbatches: int,
) -> tuple[Plan, Graph]:
    """The plan that puts operators where `choose` says, by device of the cluster."""
    planning = Planning(model, (args, kwargs), cluster, Mode.INFER, None, False, lambda line: None)
    graph = planning.captured(num_microbatches).graph
    options = PlanOptions(objective=Objective.THROUGHPUT, num_microbatches=num_microbatches)
    start = Plan(
        fingerprint=fingerprint(graph, type(model).__name__),
        cluster=cluster,
        mode=Mode.INFER,
        batch_size=planning.rows,
        optimizer=options.optimizer,
        objective=Objective.THROUGHPUT,
        num_microbatches=num_microbatches,
    )
    statement = state_workload(graph, cluster, rows=planning.rows // num_microbatches)
    plan = place_by_hand(start, Context(graph, options), choose(statement), "a test")
    return plan, graph


def scattered(seed: int) -> Choose:
    """Every operator anywhere."""

    def choose(statement: PlacementStatement) -> list[int]:
        draw = random.Random(seed)
        return [draw.randrange(len(statement.devices)) for _ in statement.units]

    return choose
