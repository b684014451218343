"""Training sharded over tensor and data axes, alone and with a pipeline, equals training in one
piece: gradients and weights after three optimizer steps."""

from __future__ import annotations

import functools

import pytest

from cutset.compiler.ir.mesh import Mesh
from cutset.runtime.inprocess import InProcessSession
from tests.exactness.harness import Subject, adamw64, sgd32
from tests.models.exact import SHARDED_MODELS
from tests.sharding.choices import flowing_layouts, random_layouts

TOLERANCE = 1e-9  # sums over ranks are taken in another order
IN_FLOAT32 = {"llama": 1e-5, "mamba": 1e-5}  # their norms are in float32 whatever the model is in
MESHES = (("tensor=2", 1), ("data=2", 1), ("data=2,tensor=2", 2))


@functools.cache
def subject(name: str) -> Subject:
    return Subject(SHARDED_MODELS[name], adamw64)


def check(
    entry: Subject, mesh: str, stages: int, tolerance: float, seed: int | None = None
) -> None:
    axes = Mesh.parse(mesh)
    graph = entry.captured.graph
    layouts = flowing_layouts(graph, axes) if seed is None else random_layouts(graph, axes, seed)
    session = InProcessSession(axes.size * stages)
    errors = entry.errors(stages, "1f1b", session, axes, layouts)
    assert all(error.value <= tolerance for error in errors.values()), errors


@pytest.mark.parametrize(("mesh", "stages"), MESHES)
@pytest.mark.parametrize("name", SHARDED_MODELS)
def test_flowing_layouts_in_double_precision(name: str, mesh: str, stages: int) -> None:
    check(subject(name), mesh, stages, IN_FLOAT32.get(name, TOLERANCE))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_random_layouts_in_double_precision(name: str) -> None:
    check(subject(name), "data=2,tensor=2", 2, TOLERANCE, seed=1)


@pytest.mark.parametrize("name", ["gpt2", "resnet"])
def test_flowing_layouts_in_single_precision(name: str) -> None:
    check(Subject(SHARDED_MODELS[name], sgd32), "data=2,tensor=2", 1, sgd32.tolerance)


def test_clipping_by_the_global_norm() -> None:
    entry = Subject(SHARDED_MODELS["gpt2"], adamw64, clip_grad_norm=0.1)
    check(entry, "data=2,tensor=2", 2, TOLERANCE)
