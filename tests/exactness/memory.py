"""Predicted and measured memory of the ranks of a plan, over a mesh, under ZeRO or not."""

from __future__ import annotations

from dataclasses import dataclass

from cutset.compiler.ir.mesh import Mesh
from cutset.cost_models.simulator import simulate
from cutset.passes.context import Context, PlanOptions
from cutset.passes.predict import predict_memory
from cutset.runtime.session import Session
from tests.exactness.harness import Subject, in_stage, layouts_over
from tests.models.exact import ROWS
from tests.sharding.choices import Layouts, zero_layouts_of

__all__ = ["MemoryCase", "RankMemory", "measure"]


@dataclass(frozen=True, slots=True)
class RankMemory:
    """The planner's bound, the simulated and the measured peak of one rank."""

    rank: int
    bound_bytes: int
    simulated_bytes: int
    peak_bytes: int


@dataclass(frozen=True, slots=True)
class MemoryCase:
    """A mesh and the level of ZeRO over its axis `data`."""

    mesh: Mesh
    zero: int

    @staticmethod
    def parse(text: str) -> MemoryCase:
        mesh, _, level = text.partition("+zero")
        return MemoryCase(Mesh.parse(mesh), int(level or 0))

    def __str__(self) -> str:
        return f"{self.mesh}+zero{self.zero}" if self.zero else str(self.mesh)

    @property
    def num_stages(self) -> int:
        return self.mesh.axis("pipeline").size

    @property
    def is_sharded(self) -> bool:
        return self.mesh.size > self.num_stages

    @property
    def num_microbatches(self) -> int:
        """As many as leave each rank of the data axis a row."""
        return min(2, ROWS // self.mesh.axis("data").size)

    def layouts(self, subject: Subject) -> Layouts | None:
        """Those in which values flow without exchange, with ZeRO; None for a pipeline."""
        if not self.is_sharded:
            return None
        graph, mesh = subject.captured.graph, in_stage(self.mesh)
        if self.zero:
            return zero_layouts_of(graph, mesh, self.zero)
        return layouts_over(graph, mesh, None)


def measure(
    subject: Subject, case: MemoryCase, schedule: str, session: Session
) -> list[RankMemory]:
    """Bounds and peak of every rank."""
    mesh = in_stage(case.mesh) if case.is_sharded else None
    layouts = case.layouts(subject)
    planned = subject.planned(case.num_stages, schedule, mesh, layouts)
    bounds = predict_memory(planned.plan, Context(subject.captured.graph, PlanOptions()))
    simulated = simulate(
        planned.programs, cluster=planned.plan.cluster, optimizer=planned.plan.optimizer
    )
    measured = subject.run(case.num_stages, schedule, session, mesh, layouts)
    return [
        RankMemory(bound.device, bound.total_bytes, level, peak)
        for bound, level, peak in zip(
            bounds, simulated.peak_memory_bytes, measured.peak_memory_bytes, strict=True
        )
    ]
