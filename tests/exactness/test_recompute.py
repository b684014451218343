"""Training with recomputation equals training in one piece; over data and tensor axes and with
parameters held in parts too."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from torch import fx

from cutset.compiler.codegen.python import emit_python, stage_function_name
from cutset.compiler.ir.graph import Graph
from cutset.compiler.ir.mesh import Mesh
from cutset.compiler.planned import PlannedModel
from cutset.compiler.sharding.sharding import make_sharding
from cutset.compiler.sharding.zero import zero_layouts
from cutset.runtime.inprocess import InProcessSession
from cutset.runtime.kernels import StageKernels, trace_training
from tests.exactness.harness import Subject, adamw64
from tests.models.exact import SHARDED_MODELS, sharded_tolerance
from tests.sharding.choices import Layouts, flowing_layouts

NORMAL = [
    ("gpt2", "full", 2, "1f1b"),
    ("llama", "selective", 3, "gpipe"),
    ("unet", "full", 2, "gpipe"),
    ("resnet", "full", 3, "1f1b"),
]
SLOW = [
    (name, how, stages, schedule)
    for name in ("gpt2", "llama", "unet", "resnet", "bert", "t5", "mamba", "transformer")
    for how in ("full", "selective")
    for stages, schedule in ((1, "1f1b"), (3, "gpipe"))
]


@functools.cache
def subject(name: str) -> Subject:
    return Subject(SHARDED_MODELS[name], adamw64)


def check(name: str, how: str, stages: int, schedule: str) -> None:
    entry = subject(name)
    errors = entry.errors(stages, schedule, InProcessSession(stages), recompute=how)
    tolerance = sharded_tolerance(name, adamw64.tolerance)
    assert all(error.value <= tolerance for error in errors.values()), errors


@pytest.mark.parametrize(("name", "how", "stages", "schedule"), NORMAL)
def test_some_train_exactly(name: str, how: str, stages: int, schedule: str) -> None:
    check(name, how, stages, schedule)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "how", "stages", "schedule"), SLOW)
def test_all_train_exactly(name: str, how: str, stages: int, schedule: str) -> None:
    check(name, how, stages, schedule)


def test_weights_and_statistics_are_bit_equal_to_those_without() -> None:
    entry = subject("resnet")
    kept, again = (
        entry.run(1, "1f1b", InProcessSession(1), recompute=how).run for how in ("none", "full")
    )
    for tensors, others in ((again.weights, kept.weights), (again.buffers, kept.buffers)):
        assert others and all(torch.equal(tensors[key], others[key]) for key in others)


def first_kernels(planned: PlannedModel) -> StageKernels:
    """Those of the first stage on the first rank, not bound to any communicator."""
    program = planned.programs[0]
    namespace: dict = {}
    exec(emit_python(program), namespace)
    stage = program.stages[0]
    function = namespace[stage_function_name(stage.index)]
    return trace_training(function, stage.graph, torch.device("cpu"))


def saved_bytes(kernels: StageKernels) -> int:
    """What F returns for backward."""
    saved = list(kernels.modules["forward"].graph.nodes)[-1].args[0][kernels.num_outputs :]
    return sum(node.meta["val"].numel() * node.meta["val"].element_size() for node in saved)


def gathers(module: fx.GraphModule) -> int:
    return sum("all_gather" in str(node.target) for node in module.graph.nodes)


@pytest.mark.parametrize(("how", "share"), [("full", 0.15), ("selective", 0.5)])
def test_less_is_saved(how: str, share: float) -> None:
    entry = subject("gpt2")
    kept, again = (first_kernels(entry.planned(1, "1f1b", recompute=x)) for x in ("none", how))
    assert 0 < saved_bytes(again) <= share * saved_bytes(kept)


@pytest.mark.parametrize(
    ("mesh", "how", "stages"), [("tensor=2", "full", 1), ("data=2", "selective", 1)]
)
def test_over_a_mesh(mesh: str, how: str, stages: int) -> None:
    entry, axes = subject("gpt2"), Mesh.parse(mesh)
    layouts = flowing_layouts(entry.captured.graph, axes)
    errors = entry.errors(stages, "1f1b", InProcessSession(2 * stages), axes, layouts, how)
    assert all(error.value <= 1e-9 for error in errors.values()), errors


def in_parts(graph: Graph, mesh: Mesh) -> Layouts:
    """The batch and all parameters in parts over `data`: ZeRO-3."""
    flowing = flowing_layouts(graph, mesh)
    sharding = make_sharding(graph, mesh, flowing.nodes, flowing.values, flowing.parameters)
    return replace(flowing, parameters=zero_layouts(graph, sharding, "data", 3))


@pytest.mark.parametrize("how", ["none", "full"])
def test_gathered_parameters_are_gathered_again(how: str) -> None:
    """F saves no more than with whole parameters, as backward gathers those that it reads."""
    entry, axes = subject("gpt2"), Mesh.parse("data=2")
    graph = entry.captured.graph
    whole = first_kernels(entry.planned(1, "1f1b", axes, flowing_layouts(graph, axes), how))
    parts = first_kernels(entry.planned(1, "1f1b", axes, in_parts(graph, axes), how))
    assert saved_bytes(parts) == saved_bytes(whole)
    assert gathers(parts.modules["forward"]) > gathers(whole.modules["forward"]) + 20
    assert gathers(parts.modules["weight"]) > gathers(whole.modules["weight"]) + 20


def test_parameters_in_parts_train_exactly() -> None:
    entry, axes = subject("gpt2"), Mesh.parse("data=2")
    layouts = in_parts(entry.captured.graph, axes)
    errors = entry.errors(2, "1f1b", InProcessSession(4), axes, layouts, "full")
    assert all(error.value <= 1e-9 for error in errors.values()), errors
