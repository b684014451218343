"""Training over stages with meshes of their own equals training in one piece: gradients and weights
after three optimizer steps, dropout on where the model has it."""

from __future__ import annotations

import pytest

from cutset.compiler.ir.errors import VerificationError
from cutset.compiler.ir.mesh import parse_stage_meshes
from cutset.runtime.inprocess import InProcessSession
from tests.exactness.harness import Subject, adamw64, sharded_tolerance_of
from tests.models.exact import SHARDED_MODELS

MESHES = (
    "data=2/data=1",
    "tensor=2/data=2",
    "data=1/tensor=2",
    "data=2,tensor=2/tensor=2",
    "data=2/tensor=2/data=1",
)


def check(
    name: str, meshes: str, *, seed: int | None = None, zero: int = 0, clip: float | None = None
) -> None:
    subject = Subject(SHARDED_MODELS[name], adamw64, clip_grad_norm=clip)
    session = InProcessSession(sum(mesh.size for mesh in parse_stage_meshes(meshes)))
    errors = subject.mixed_errors(meshes, session, seed=seed, zero=zero)
    tolerance = sharded_tolerance_of(name, adamw64)
    assert subject.reference.gradients
    assert all(error.value <= tolerance for error in errors.values()), errors


@pytest.mark.parametrize(
    ("name", "meshes", "seed"),
    [
        ("gpt2", "data=2/data=1", None),
        ("gpt2", "data=2,tensor=2/tensor=2", None),
        ("resnet", "tensor=2/data=2", 0),
        ("checkpoint", "data=1/tensor=2", 1),
        ("checkpoint", "data=2/tensor=2/data=1", None),
    ],
)
def test_double_precision(name: str, meshes: str, seed: int | None) -> None:
    check(name, meshes, seed=seed)


@pytest.mark.parametrize("zero", [2, 3])
def test_zero_and_clipping_by_the_global_norm(zero: int) -> None:
    check("checkpoint", "data=2,tensor=2/data=2", zero=zero, clip=0.1)


@pytest.mark.parametrize("meshes", ["tensor=2/data=2", "data=2,tensor=2/data=1"])
def test_a_tied_parameter_with_copies_that_have_one_term(meshes: str) -> None:
    """Along `tensor` the ranks have the same gradient of the embeddings."""
    check("bert", meshes, clip=0.1)


def test_parts_of_a_tied_parameter_are_refused() -> None:
    with pytest.raises(VerificationError, match="hold but parts"):
        check("bert", "tensor=2/data=2", seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [None, 0])
@pytest.mark.parametrize("meshes", MESHES)
@pytest.mark.parametrize(
    "name", ["resnet", "unet", "vit", "no_grad", "straight_through", "checkpoint"]
)
def test_models_over_unlike_meshes(name: str, meshes: str, seed: int | None) -> None:
    check(name, meshes, seed=seed)
