"""The memory that a simulated step takes stays below the planner's bound, and near it."""

from __future__ import annotations

import functools

import pytest

from cutset.cost_models import simulate
from cutset.passes.context import Context, PlanOptions
from cutset.passes.predict import predict_memory
from tests.exactness.harness import Subject, adamw64, in_stage
from tests.exactness.memory import MemoryCase
from tests.models.exact import SHARDED_MODELS


@functools.cache
def subject(num_microbatches: int) -> Subject:
    return Subject(SHARDED_MODELS["gpt2"], adamw64, num_microbatches=num_microbatches)


@pytest.mark.parametrize(
    ("text", "schedule"),
    [
        ("pipeline=3", "1f1b"),
        ("pipeline=3", "gpipe"),
        ("data=2+zero1", "1f1b"),
        ("data=2+zero2", "1f1b"),
        ("data=2+zero3", "1f1b"),
        ("data=2,pipeline=2,tensor=2", "1f1b"),
    ],
)
def test_simulated_peaks_keep_to_the_bound(text: str, schedule: str) -> None:
    case = MemoryCase.parse(text)
    entry = subject(case.num_microbatches)
    mesh = in_stage(case.mesh) if case.is_sharded else None
    planned = entry.planned(case.num_stages, schedule, mesh, case.layouts(entry))
    bounds = predict_memory(planned.plan, Context(entry.captured.graph, PlanOptions()))
    found = simulate(
        planned.programs, cluster=planned.plan.cluster, optimizer=planned.plan.optimizer
    )
    for bound, peak in zip(bounds, found.peaks, strict=True):
        assert bound.device == peak.rank
        assert 0.8 * bound.total_bytes <= peak.total_bytes <= bound.total_bytes
        assert peak.parameters_bytes + peak.gradients_bytes + peak.optimizer_bytes == (
            bound.parameters_bytes + bound.gradients_bytes + bound.optimizer_bytes
        )
