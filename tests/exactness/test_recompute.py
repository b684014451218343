"""Training with recomputation equals training in one piece, and weights are bit-equal to those
without; over data and tensor axes and with parameters held in parts too."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
import torch

from cutset.compiler.ir.graph import Graph
from cutset.compiler.ir.mesh import Mesh
from cutset.compiler.sharding.zero import zero_layouts
from cutset.runtime.inprocess import InProcessSession
from cutset.runtime.kernels import StageKernels
from tests.exactness.harness import Subject, adamw64
from tests.models.exact import SHARDED_MODELS
from tests.sharding.choices import Layouts, flowing_layouts

IN_FLOAT32 = {"llama": 1e-5}  # its norms are in float32 whatever the model is in


@functools.cache
def subject(name: str) -> Subject:
    return Subject(SHARDED_MODELS[name], adamw64)


def training_kernels(session: InProcessSession) -> Iterator[StageKernels]:
    for rank in session.ranks:
        for executor in rank._executors.values():
            yield from (k for k in executor._kernels.values() if k.backward_weight is not None)


def saved_bytes(session: InProcessSession) -> int:
    """What F of the first rank returns for backward."""
    kernels = next(training_kernels(session))
    saved = list(kernels.modules["forward"].graph.nodes)[-1].args[0][kernels.num_outputs :]
    return sum(node.meta["val"].numel() * node.meta["val"].element_size() for node in saved)


@pytest.mark.parametrize(
    ("name", "how", "stages", "schedule", "falls"),
    [
        ("gpt2", "full", 2, "1f1b", 0.2),
        ("gpt2", "selective", 3, "gpipe", 0.6),
        ("llama", "full", 3, "gpipe", 0.4),
        ("llama", "selective", 1, "1f1b", 0.7),
        ("unet", "full", 2, "1f1b", 0.8),
        ("unet", "selective", 1, "gpipe", 0.95),
        ("resnet", "full", 3, "1f1b", 1.0),
    ],
)
def test_as_exact_as_without(
    name: str, how: str, stages: int, schedule: str, falls: float
) -> None:
    entry = subject(name)
    plain, session = InProcessSession(stages), InProcessSession(stages)
    expected = entry.run(stages, schedule, plain).run
    errors = entry.errors(stages, schedule, session, recompute=how)
    tolerance = IN_FLOAT32.get(name, adamw64.tolerance)
    assert all(error.value <= tolerance for error in errors.values()), errors
    again = entry.run(stages, schedule, InProcessSession(stages), recompute=how).run
    for tensors, others in ((again.weights, expected.weights), (again.buffers, expected.buffers)):
        assert all(torch.equal(tensors[key], others[key]) for key in others)
    assert saved_bytes(session) <= falls * saved_bytes(plain)


def in_parts(graph: Graph, mesh: Mesh) -> Layouts:
    """The batch and all parameters in parts over `data`: ZeRO-3."""
    flowing = flowing_layouts(graph, mesh)
    parameters = zero_layouts(graph, mesh, flowing.parameters, axis="data", level=3)
    return Layouts(flowing.nodes, flowing.values, parameters)


@pytest.mark.parametrize(
    ("mesh", "how", "stages"), [("tensor=2", "full", 1), ("data=2", "selective", 2)]
)
def test_sharded(mesh: str, how: str, stages: int) -> None:
    entry, axes = subject("gpt2"), Mesh.parse(mesh)
    layouts = flowing_layouts(entry.captured.graph, axes)
    session = InProcessSession(2 * stages)
    errors = entry.errors(stages, "1f1b", session, axes, layouts, how)
    assert all(error.value <= 1e-9 for error in errors.values()), errors


@pytest.mark.parametrize("how", ["none", "full"])
def test_gathered_parameters_are_not_kept(how: str) -> None:
    """They are gathered again: backward holds as many gathers as it reads parameters, and F saves
    no more than with whole parameters."""
    entry, axes = subject("gpt2"), Mesh.parse("data=2")
    graph = entry.captured.graph
    plain, session = InProcessSession(2), InProcessSession(2)
    entry.run(1, "1f1b", plain, axes, flowing_layouts(graph, axes), how)
    errors = entry.errors(1, "1f1b", session, axes, in_parts(graph, axes), how)
    assert all(error.value <= 1e-9 for error in errors.values()), errors
    assert saved_bytes(session) == saved_bytes(plain)
    (kernels, _) = training_kernels(session)
    gathers = [n for n in kernels.modules["weight"].graph.nodes if "all_gather" in str(n.target)]
    assert len(gathers) > 20
