"""Why no partition fits, by how much it fails, and what would help.

Each way out that is named was tried: with it, a partition was found that fits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from ...compiler.ir.cluster import Cluster
from ...compiler.ir.errors import InfeasibleError
from ...compiler.ir.graph import Mode
from ...compiler.ir.plan import MemoryPrediction, OptimizerModel
from ..offload import have_hosts, offloaded_figures
from .closest import program_order
from .fitting import find_fitting
from .from_graph import state_problem
from .problem import Assignment, DeviceClass, StageProblem
from .search import SearchLimits, Tables, estimate
from .statement import Statement

__all__ = ["explain", "unsupported"]

_GIB = 1 << 30
_MIB = 1 << 20
_MOST_DEVICES = 256
_MOST_TRIES = 6
_GENEROUS = 1.25


def unsupported(statement: Statement, problem: StageProblem) -> InfeasibleError | None:
    """The error for a unit that no device can run, if there is one."""
    graph, cluster = statement.graph, statement.cluster
    used = {device.type for device in cluster.devices}
    missing = [set(entry.unsupported_ops) for entry in cluster.types if entry.name in used]
    for index, unit in enumerate(problem.units):
        if not math.isinf(min(unit.forward_seconds)):
            continue
        for node in statement.units[index]:
            entry = graph.nodes[node]
            if any(entry.op.name in ops for ops in missing):
                return InfeasibleError(
                    f"no device of cluster {cluster.name!r} can run {unit.name} with "
                    f"{entry.op.name}",
                    where=" ".join(filter(None, (entry.module_path, entry.source))),
                    ways_out=("add a device of a type that supports it",),
                )
    return None


def explain(
    statement: Statement,
    problem: StageProblem,
    stage_counts: tuple[int, ...],
    closest: Assignment,
    needs: tuple[MemoryPrediction, ...],
) -> InfeasibleError:
    """The error for a problem without solution.

    Args:
        closest: the partition that comes closest.
        needs: memory of its stages by liveness.
    """
    limits = [problem.classes[cls].memory_bytes for cls in closest.classes]
    stage = max(range(len(needs)), key=lambda index: needs[index].total_bytes - limits[index])
    need, limit = needs[stage], limits[stage]
    members = [unit for unit, place in enumerate(closest.stages) if place == stage]
    kind = statement.cluster.type_of(need.device).name
    place = _place(problem, members)
    return InfeasibleError(
        f"stage memory: {_size(need.total_bytes)} needed on device {need.device} ({kind}) for "
        f"{place}, {_size(limit)} available: short by {_size(need.total_bytes - limit)}, in the "
        f"partition into {len(needs)} stage{'s' * (len(needs) > 1)} that comes closest",
        where=f"stage {stage}: {_parts(need, problem.in_flight(len(needs), stage))}",
        ways_out=tuple(_ways_out(statement, problem, stage_counts, need.total_bytes)),
    )


def _place(problem: StageProblem, members: list[int]) -> str:
    first, last = (problem.units[unit].name.split(" .. ") for unit in (members[0], members[-1]))
    return first[0] if first[0] == last[-1] else f"{first[0]} to {last[-1]}"


def _parts(need: MemoryPrediction, in_flight: int) -> str:
    state = need.parameters_bytes + need.gradients_bytes + need.optimizer_bytes
    return (
        f"{_size(state)} parameters, gradients and optimizer states, "
        f"{_size(need.activations_bytes)} saved by {in_flight} microbatches in flight, "
        f"{_size(need.transients_bytes + need.communication_bytes)} at work and in messages"
    )


def _size(num_bytes: float) -> str:
    if num_bytes >= _GIB:
        return f"{num_bytes / _GIB:.1f} GiB"
    return (
        f"{num_bytes / _MIB:.1f} MiB" if num_bytes >= 10 * _MIB else f"{num_bytes / _MIB:.2f} MiB"
    )


def _ways_out(
    statement: Statement, problem: StageProblem, stage_counts: tuple[int, ...], need: int
) -> Iterator[str]:
    """Remedies, each tried on the problem; the last ones always apply."""
    most = min(problem.num_devices, len(problem.units))
    wider = tuple(range(max(stage_counts) + 1, most + 1))
    if wider and _fits(statement, problem, wider):
        yield "allow more stages: the cluster has devices left"
    devices = _enough_devices(statement, problem)
    if devices is not None:
        yield f"{devices} devices of this memory instead of {problem.num_devices}"
    leaner = replace(problem, schedule="1f1b")
    if problem.schedule == "gpipe" and _fits(statement, leaner, stage_counts):
        yield "schedule 1f1b, which keeps fewer microbatches in flight"
    away = _offloading(statement)
    if away is not None:
        other = state_problem(away, problem.num_microbatches)
        if _fits(away, other, stage_counts):
            yield "optimizer states in the memory of the hosts: offload='optimizer' or 'auto'"
    number = _more_microbatches(statement, problem, stage_counts)
    if number is not None:
        yield f"{number} microbatches instead of {problem.num_microbatches}"
    if statement.graph.mode is Mode.TRAIN and statement.optimizer.state_bytes_per_parameter_byte:
        stateless = replace(statement, optimizer=OptimizerModel("sgd", 0.0))
        other = state_problem(stateless, problem.num_microbatches)
        if _fits(stateless, other, stage_counts):
            yield "an optimizer without state, such as SGD without momentum"
    yield f"devices, or a memory limit, of {_size(need)} or more"
    yield "a smaller batch or shorter sequences"


def _offloading(statement: Statement) -> Statement | None:
    """`statement` with all optimizer states on the hosts, if they are not there yet and can be."""
    graph, optimizer = statement.graph, statement.optimizer
    away = any(entry.is_offloaded for entry in statement.parameters.values())
    keeps = graph.mode is Mode.TRAIN and optimizer.state_bytes_per_parameter_byte > 0
    if away or not keeps or not have_hosts(statement.cluster):
        return None
    figures = offloaded_figures(graph, statement.parameters, optimizer)
    return replace(statement, parameters=figures)


def _fits(statement: Statement, problem: StageProblem, stage_counts: tuple[int, ...]) -> bool:
    limits = SearchLimits(num_orders=1, num_thresholds=1)
    tables = Tables.of(problem, limits)
    found = find_fitting(
        statement,
        problem,
        stage_counts,
        lambda other: estimate(other, stage_counts, limits, tables),
    )
    return found is not None


def _enough_devices(statement: Statement, problem: StageProblem) -> int | None:
    """Least number of devices, all as the largest of the problem, that was found to do."""
    largest = max(problem.classes, key=lambda entry: entry.memory_bytes)
    most = min(len(problem.units), _MOST_DEVICES)
    table = program_order(_on_many(problem, largest, most))
    reached = np.arange(table.size) == table.size - 1
    tries = 0
    for count in range(1, most + 1):
        in_flight = problem.in_flight(count, 0)
        fits = table.fitting(in_flight, math.floor(_GENEROUS * largest.memory_bytes))
        reached = (fits & reached[None, :]).any(axis=1)
        if reached[0] and count > problem.num_devices and tries < _MOST_TRIES:
            tries += 1
            more = replace(statement, cluster=_of_kind(statement.cluster, largest, count))
            if _fits(more, _on_many(problem, largest, count), (count,)):
                return count
    return None


def _on_many(problem: StageProblem, kind: DeviceClass, count: int) -> StageProblem:
    """`problem` on `count` devices of one kind."""
    return replace(
        problem,
        classes=(replace(kind, devices=tuple(range(count))),),
        links=((problem.sync_link,),),
        class_pins=(),
        stage_pins=(),
    )


def _of_kind(cluster: Cluster, kind: DeviceClass, count: int) -> Cluster:
    """A cluster of `count` devices like those of `kind`."""
    model = cluster.devices[kind.devices[0]]
    return replace(cluster, devices=tuple(replace(model, index=index) for index in range(count)))


def _more_microbatches(
    statement: Statement, problem: StageProblem, stage_counts: tuple[int, ...]
) -> int | None:
    """The least larger divisor of the batch size that would do, of those tried by doubling."""
    wanted = 2 * problem.num_microbatches
    for number in range(problem.num_microbatches + 1, statement.batch_size + 1):
        last = number == statement.batch_size
        if statement.batch_size % number == 0 and (number >= wanted or last):
            if _fits(statement, state_problem(statement, number), stage_counts):
                return number
            wanted = 2 * number
    return None
