"""Why no partition fits, by how much it fails, and what would help.

The partition that comes closest minimises the largest excess of any stage over its device's
memory, by dynamic programming over prefixes of program order. Each way out that is named was tried
on the same problem: it makes that excess vanish.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from ...compiler.ir.errors import InfeasibleError
from ...compiler.ir.graph import Mode
from ...compiler.ir.plan import MemoryPrediction
from .downsets import DownSets
from .from_graph import state_problem
from .problem import Assignment, DeviceClass, StageProblem, topological_order
from .statement import Statement

__all__ = ["closest_partition", "infeasible", "unsupported"]

_GIB = 1 << 30
_MIB = 1 << 20
_MOST_DEVICES = 256


def closest_partition(
    problem: StageProblem, stage_counts: tuple[int, ...]
) -> tuple[Assignment, float]:
    """The interval partition of program order whose worst stage exceeds its memory least.

    Stages take devices by memory, most first (early stages keep most microbatches in flight).
    Returns it with that excess in bytes, negative if everything fits.
    """
    count = len(problem.units)
    table = _prefixes(problem)
    found = [_least_excess(table, num_stages) for num_stages in stage_counts if num_stages <= count]
    return min(found, key=lambda item: item[1])


def _prefixes(problem: StageProblem) -> DownSets:
    order = topological_order(len(problem.units), problem.edges(), lambda unit: unit)
    sets = itertools.accumulate((1 << unit for unit in order), initial=0)
    return DownSets(problem, tuple(sets), complete=False)


def _least_excess(table: DownSets, num_stages: int) -> tuple[Assignment, float]:
    problem = table.problem
    devices = sorted(
        (-entry.memory_bytes, device, cls)
        for cls, entry in enumerate(problem.classes)
        for device in entry.devices
    )
    classes = tuple(cls for _, _, cls in devices[:num_stages])
    value = np.where(np.arange(table.size) == 0, -math.inf, math.inf)
    trail = []
    for stage, cls in enumerate(classes):
        need = table.memory(problem.in_flight(num_stages, stage))
        excess = np.where(table.nested, need - problem.classes[cls].memory_bytes, math.inf)
        reached = np.maximum(value[:, None], excess)
        trail.append(reached.argmin(axis=0))
        value = reached.min(axis=0)
    end, ends = table.size - 1, []
    for origins in reversed(trail):
        ends.append(end)
        end = int(origins[end])
    return table.assign(ends[::-1], classes), float(value[-1])


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


def infeasible(
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
    if abs(num_bytes) >= 0.1 * _GIB:
        return f"{num_bytes / _GIB:.1f} GiB"
    return f"{num_bytes / _MIB:.2f} MiB"


def _ways_out(
    statement: Statement, problem: StageProblem, stage_counts: tuple[int, ...], need: int
) -> Iterator[str]:
    """Remedies, each tried on the problem; the last ones always apply."""
    most = max(stage_counts)
    if most < min(problem.num_devices, len(problem.units)):
        wider = tuple(range(most + 1, min(problem.num_devices, len(problem.units)) + 1))
        if closest_partition(problem, wider)[1] <= 0:
            yield "allow more stages: the cluster has devices left"
    devices = _enough_devices(problem)
    if devices is not None:
        yield f"{devices} devices of this memory instead of {problem.num_devices}"
    if problem.schedule == "gpipe" and _fits(replace(problem, schedule="1f1b"), stage_counts):
        yield "schedule 1f1b, which keeps fewer microbatches in flight"
    number = _more_microbatches(statement, problem, stage_counts)
    if number is not None:
        yield f"{number} microbatches instead of {problem.num_microbatches}"
    ratio = statement.optimizer.state_bytes_per_parameter_byte
    if statement.graph.mode is Mode.TRAIN and ratio > 0:
        leaner = replace(statement.optimizer, state_bytes_per_parameter_byte=0.0)
        other = state_problem(replace(statement, optimizer=leaner), problem.num_microbatches)
        if _fits(other, stage_counts):
            yield "an optimizer with less state, such as SGD without momentum"
    yield f"devices, or a memory limit, of {_size(need)} or more"
    yield "a smaller batch or shorter sequences"


def _fits(problem: StageProblem, stage_counts: tuple[int, ...]) -> bool:
    return closest_partition(problem, stage_counts)[1] <= 0


def _enough_devices(problem: StageProblem) -> int | None:
    """Least number of devices, all as the largest of the problem, that would do."""
    largest = max(problem.classes, key=lambda entry: entry.memory_bytes)
    most = min(len(problem.units), _MOST_DEVICES)
    if most <= problem.num_devices:
        return None
    many = replace(
        problem,
        classes=(DeviceClass(largest.type, largest.memory_bytes, tuple(range(most))),),
        links=((problem.sync_link,),),
        class_pins=(),
        stage_pins=(),
    )
    table = _prefixes(many)
    reached = np.arange(table.size) == table.size - 1
    for tail in range(1, most + 1):
        fits = table.fitting(many.in_flight(tail, 0), largest.memory_bytes)
        reached = (fits & reached[None, :]).any(axis=1)
        if reached[0] and tail > problem.num_devices:
            return tail
    return None


def _more_microbatches(
    statement: Statement, problem: StageProblem, stage_counts: tuple[int, ...]
) -> int | None:
    """The least larger divisor of the batch size that would do, of those tried by doubling."""
    wanted = 2 * problem.num_microbatches
    for number in range(problem.num_microbatches + 1, statement.batch_size + 1):
        if statement.batch_size % number == 0 and (
            number >= wanted or number == statement.batch_size
        ):
            if _fits(state_problem(statement, number), stage_counts):
                return number
            wanted = 2 * number
    return None
