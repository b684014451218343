"""The fastest partition that fits into memory, by additive bounds first and liveness in the end.

What a stage needs is not a sum over its units: tensors live and die. The stage problem therefore
holds an additive bound of memory, and what it finds is held to the memory by liveness.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from ...compiler.ir.plan import MemoryPrediction, Stage
from ...cost_models.analysis import batch_rows
from ...cost_models.memory import consuming_stages, stage_memory
from ...cost_models.memory_tables import MemoryModel, memory_model
from ..replicate import complete_stages
from .closest import closest_partition
from .devices import used_types
from .objective import stage_figures, step_seconds
from .problem import Assignment, StageProblem
from .search import Solution, simple_bound
from .statement import Statement

__all__ = ["Fit", "Needs", "find_fitting", "stages_of", "with_memory"]

_ATTEMPTS = 5
_GENEROUS = 1.25  # the additive bound of memory exceeds that by liveness by about this
_SMALLER = 0.995
_DOUBTFUL = 0.5


@dataclass(frozen=True, slots=True)
class Fit:
    """A solution that fits, its stages, and the share of the devices' memory that the additive
    bound of a partition was allowed to take up."""

    solution: Solution
    stages: tuple[Stage, ...]
    share: float


def find_fitting(
    statement: Statement,
    problem: StageProblem,
    stage_counts: tuple[int, ...],
    solve: Callable[[StageProblem], Solution],
) -> Fit | None:
    """The fastest partition that fits by liveness, None if none is found.

    The additive bound exceeds the need by some share. So the problem is first solved with that
    much more memory than there is, then, while what is found does not fit, with the share that
    its worst stage shows. In the end the partition that needs least memory is tried.
    """
    needs = Needs.of(statement, problem)
    share = _GENEROUS
    for _ in range(_ATTEMPTS):
        solution = solve(with_memory(problem, share))
        if solution.assignment is None:
            break
        fitting = needs.fitting_share(solution.assignment)
        if fitting is None:
            return Fit(solution, stages_of(statement, problem, solution.assignment), share)
        share = min(fitting, share * _SMALLER)
    closest, _ = closest_partition(problem, stage_counts)
    if needs.fitting_share(closest) is not None:
        return None
    seconds = step_seconds(problem, closest)
    bound = min(seconds, *(simple_bound(problem, count) for count in stage_counts))
    solution = Solution(closest, seconds, bound, ("least memory of program order",))
    return Fit(solution, stages_of(statement, problem, closest), _GENEROUS)


def with_memory(problem: StageProblem, share: float) -> StageProblem:
    """`problem` on devices with `share` times their memory."""
    classes = tuple(
        replace(entry, memory_bytes=math.floor(entry.memory_bytes * share))
        for entry in problem.classes
    )
    return replace(problem, classes=classes)


@dataclass(frozen=True, slots=True)
class Needs:
    """Memory of stages by liveness; one model for each kind of device."""

    statement: Statement
    problem: StageProblem
    models: dict[str, MemoryModel]

    @staticmethod
    def of(statement: Statement, problem: StageProblem) -> Needs:
        graph = statement.graph
        fraction = statement.batch_size / problem.num_microbatches / batch_rows(graph)
        backends = sorted({entry.backend for entry in used_types(statement.cluster)})
        models = {
            backend: memory_model(graph, batch_fraction=fraction, backend=backend)
            for backend in backends
        }
        return Needs(statement, problem, models)

    def by_liveness(self, assignment: Assignment) -> tuple[MemoryPrediction, ...]:
        """Memory of each stage."""
        every = range(assignment.num_stages)
        return tuple(self._by_liveness(assignment, every).values())

    def _by_liveness(
        self, assignment: Assignment, wanted: Iterable[int]
    ) -> dict[int, MemoryPrediction]:
        """Memory of the `wanted` stages."""
        stages = stages_of(self.statement, self.problem, assignment)
        consumers = consuming_stages(self.statement.graph, stages)
        return {
            index: stage_memory(
                self.models[self.statement.cluster.type_of(stages[index].device).backend],
                stages[index].nodes,
                in_flight=self.problem.in_flight(len(stages), index),
                optimizer=self.statement.optimizer,
                device=stages[index].device,
                num_microbatches=self.problem.num_microbatches,
                consumers=consumers,
                recomputed=self.statement.recomputed,
                parameters=self.statement.parameters,
            )
            for index in wanted
        }

    def fitting_share(self, assignment: Assignment) -> float | None:
        """None if all stages fit; else the least additive bound of a stage that does not, as a
        share of its need by liveness, less by as much as its host has not enough memory. Stages far
        below their limit are not looked at unless they offload."""
        bounds = stage_figures(self.problem, assignment)
        offloads = any(entry.is_offloaded for entry in self.statement.parameters.values())
        doubtful = [
            index
            for index, bound in enumerate(bounds)
            if offloads or bound.memory_bytes > _DOUBTFUL * bound.limit_bytes
        ]
        shares = []
        for index, need in self._by_liveness(assignment, doubtful).items():
            limit = bounds[index].limit_bytes
            room = self._host_room(need)
            if need.total_bytes > limit or room < 1.0:
                shares.append(bounds[index].memory_bytes / max(need.total_bytes, limit) * room)
        return min(shares, default=None)

    def _host_room(self, need: MemoryPrediction) -> float:
        """Of what a device offloads, the share that its host has memory for; at most 1."""
        host = self.statement.cluster.type_of(need.device).host
        if host is None or not need.host_bytes:
            return 1.0
        return min(1.0, host.memory_bytes / need.host_bytes)


def stages_of(
    statement: Statement, problem: StageProblem, assignment: Assignment
) -> tuple[Stage, ...]:
    """Stages of the nodes of `assignment`, with the replicated nodes that each needs."""
    graph = statement.graph
    groups: list[set[int]] = [set() for _ in assignment.classes]
    for unit, stage in enumerate(assignment.stages):
        groups[stage].update(statement.units[unit])
    complete_stages(graph, groups)
    devices = assignment.devices(problem)
    return tuple(
        Stage(index, (device,), tuple(sorted(group)))
        for index, (device, group) in enumerate(zip(devices, groups, strict=True))
    )
