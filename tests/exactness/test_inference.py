"""Inference of a partitioned model gives what the model gives: bit for bit in one microbatch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from cutset.compiler.api import auto_partition
from cutset.compiler.capture.signature import num_targets
from cutset.compiler.ir.mesh import Mesh
from cutset.compiler.ir.plan import Plan
from cutset.compiler.reference import flatten_outputs
from cutset.runtime.inprocess import InProcessSession
from tests.models.exact import EXACT_MODELS

ROUNDING = 1e-12


def outputs(
    name: str, ranks: int = 3, **pinned: Any
) -> tuple[dict[str, Tensor], dict[str, Tensor], Plan]:
    """What the partitioned model and the model return, and the plan."""
    torch.manual_seed(11)
    made = EXACT_MODELS[name]()
    model = made.model.double().eval()
    args = tuple(map(_double, made.args[: len(made.args) - num_targets(made.loss_fn)]))
    kwargs = {key: _double(item) for key, item in made.kwargs.items()}
    with auto_partition(
        model,
        ranks,
        example_inputs=args,
        example_kwargs=kwargs,
        mode="infer",
        check=False,
        session=InProcessSession(ranks),
        **pinned,
    ) as parallel:
        ours = parallel(*args, **kwargs)
    with torch.no_grad(), _composite_layers():
        theirs = model(*args, **kwargs)
    assert type(ours) is type(theirs)
    return flatten_outputs(ours), flatten_outputs(theirs), parallel.plan


@contextlib.contextmanager
def _composite_layers() -> Iterator[None]:
    """In eval mode nn.TransformerEncoder calls one fused kernel, which rounds in another order."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(before)


def _double(item: Any) -> Any:
    return item.double() if isinstance(item, Tensor) and item.is_floating_point() else item


@pytest.mark.parametrize("name", EXACT_MODELS)
def test_one_microbatch_is_bit_equal(name: str) -> None:
    ours, theirs, _ = outputs(name, num_stages=3, num_microbatches=1)
    assert theirs
    for place, tensor in theirs.items():
        assert torch.equal(ours[place], tensor), place


@pytest.mark.parametrize("name", ["gpt2", "unet"])
def test_several_microbatches_differ_by_rounding(name: str) -> None:
    _assert_close(*outputs(name, num_stages=3, num_microbatches=4)[:2])


@pytest.mark.parametrize("name", ["resnet"])
def test_a_mesh_is_chosen_for_inference_too(name: str) -> None:
    ours, theirs, plan = outputs(name, 2)
    assert plan.mesh.axes, "several devices beat one"
    _assert_close(ours, theirs)


@pytest.mark.parametrize("mesh", ["tensor=2", "data=2,tensor=2", "pipeline=2,tensor=2"])
def test_inference_on_a_mesh_differs_by_rounding(mesh: str) -> None:
    _assert_close(*outputs("gpt2", Mesh.parse(mesh).size, mesh=mesh)[:2])


def _assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for place, tensor in theirs.items():
        torch.testing.assert_close(ours[place], tensor, rtol=ROUNDING, atol=ROUNDING)
