"""Training is exact where gradients are summed inside the backward that completes them."""

from __future__ import annotations

import functools

import pytest

from cutset.compiler.ir import buckets
from cutset.compiler.ir.mesh import Mesh
from cutset.compiler.ir.program import AllReduce, BackwardWeight, ReduceScatter
from cutset.runtime.inprocess import InProcessSession
from tests.exactness.harness import Subject, adamw64, sharded_tolerance_of
from tests.models.exact import SHARDED_MODELS
from tests.sharding.choices import zero_layouts_of


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    """As these models are small."""
    monkeypatch.setattr(buckets, "_LEAST_BYTES", 1 << 10)


@functools.cache
def subject(name: str) -> Subject:
    return Subject(SHARDED_MODELS[name], adamw64, clip_grad_norm=0.1)


@pytest.mark.parametrize(
    ("name", "mesh", "stages", "schedule", "level"),
    [
        ("gpt2", "data=2", 1, "1f1b", 0),  # its tied weight is complete last
        ("gpt2", "data=2", 1, "1f1b", 1),
        ("gpt2", "data=2", 2, "1f1b", 1),  # tied over stages: summed after all actions
        ("unet", "data=2", 1, "gpipe", 0),
        ("llama", "data=2,tensor=2", 1, "1f1b", 0),  # ranks meet inside the parts
        ("llama", "data=2", 2, "gpipe", 0),
    ],
)
def test_models_train_exactly(name: str, mesh: str, stages: int, schedule: str, level: int) -> None:
    entry, axes = subject(name), Mesh.parse(mesh)
    layouts = zero_layouts_of(entry.captured.graph, axes, level)
    for program in entry.planned(stages, schedule, axes, layouts).programs:
        items = program.instructions
        last = max(i for i, item in enumerate(items) if isinstance(item, BackwardWeight))
        sums = [i for i, item in enumerate(items) if isinstance(item, AllReduce | ReduceScatter)]
        assert len(program.stages[0].parts) > 2
        assert sums[0] < last
    session = InProcessSession(axes.size * stages)
    errors = entry.errors(stages, schedule, session, axes, layouts)
    limit = sharded_tolerance_of(name, adamw64)
    assert all(error.value <= limit for error in errors.values()), errors


@pytest.mark.parametrize(
    ("name", "mesh", "stages", "level"),
    [("gpt2", "data=2", 1, 2), ("gpt2", "data=2", 2, 3), ("resnet", "data=2", 1, 3)],
)
def test_gradients_kept_in_parts_train_exactly(
    name: str, mesh: str, stages: int, level: int
) -> None:
    """Few of their sums are under way at once, so that they end in the midst of backward."""
    entry, axes = subject(name), Mesh.parse(mesh)
    layouts = zero_layouts_of(entry.captured.graph, axes, level)
    errors = entry.errors(stages, "1f1b", InProcessSession(axes.size * stages), axes, layouts)
    limit = sharded_tolerance_of(name, adamw64)
    assert all(error.value <= limit for error in errors.values()), errors
