"""Training sharded over tensor and data axes, alone and with a pipeline, equals training in one
piece: gradients and weights after three optimizer steps, dropout on where the model has it.

A few plans here; every model over every mesh is slow (`make test-all`), as is
`benchmarks/exactness.py --mesh`.
"""

from __future__ import annotations

import pytest

from cutset.compiler.ir.mesh import Mesh
from cutset.runtime.inprocess import InProcessSession
from tests.exactness.harness import Numerics, Subject, adamw64, sgd32, sharded_tolerance_of
from tests.models.exact import SHARDED_MODELS

MESHES = (
    "tensor=2",
    "tensor=4",
    "data=2",
    "pipeline=2,tensor=2",
    "data=2,tensor=2",
    "data=2,pipeline=2,tensor=2",
)


def check(
    name: str,
    mesh: str,
    numerics: Numerics = adamw64,
    *,
    seed: int | None = None,
    clip: float | None = None,
) -> None:
    axes = Mesh.parse(mesh)
    subject = Subject(SHARDED_MODELS[name], numerics, clip_grad_norm=clip)
    errors = subject.sharded_errors(axes, InProcessSession(axes.size), seed=seed)
    tolerance = sharded_tolerance_of(name, numerics)
    assert subject.reference.gradients
    assert all(error.value <= tolerance for error in errors.values()), errors


@pytest.mark.parametrize(
    ("name", "mesh", "seed"),
    [
        ("gpt2", "pipeline=2,tensor=2", None),
        ("resnet", "data=2", None),
        ("unet", "tensor=2", 0),
        ("no_grad", "data=2,tensor=2", 1),
        ("checkpoint", "pipeline=2,tensor=2", 2),
    ],
)
def test_double_precision(name: str, mesh: str, seed: int | None) -> None:
    check(name, mesh, seed=seed)


def test_single_precision_and_clipping_by_the_global_norm() -> None:
    check("checkpoint", "data=2,pipeline=2,tensor=2", sgd32, clip=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("numerics", [adamw64, sgd32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", SHARDED_MODELS)
def test_every_model_over_every_mesh(name: str, numerics: Numerics, mesh: str) -> None:
    check(name, mesh, numerics)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARDED_MODELS)
def test_clipping_under_random_layouts(name: str) -> None:
    check(name, MESHES[-1], seed=3, clip=0.1)
