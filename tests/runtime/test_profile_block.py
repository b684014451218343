"""Blocks run as stages do: the same kernels, every source there, no tensor kept too long."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cutset.compiler.codegen.python import stage_source
from cutset.compiler.ir.graph import Mode, OutputKind, ValueKind
from cutset.compiler.ir.program import StageProgram
from cutset.runtime import profile_block
from cutset.runtime.profile_block import BlockRun, block_kernels
from cutset.runtime.rank import stage_functions
from cutset.runtime.stand_in import filled
from tests.ir.builders import GraphBuilder

CPU = torch.device("cpu")
HEAD = "import torch\nfrom cutset.runtime import rng\naten = torch.ops.aten\n"


def layer(mode: Mode, *, shared: bool = False) -> StageProgram:
    """A layer between two others, of tensor parallelism if `shared`."""
    build = GraphBuilder("layer", mode)
    h = build.boundary("h", (8, 16), requires_grad=mode is Mode.TRAIN)
    w = build.parameter("w", (16, 16))
    if shared:
        h = build.op("cutset.sum_gradient.default", h, "tensor")
    y = build.op("aten.gelu.default", build.op("aten.linear.default", h, w))
    if shared:
        y = build.op("cutset.all_reduce.default", y, "tensor", "sum")
        y = build.op("cutset.all_gather.default", y, "tensor", 0, (8, 8), 0, False)
        y = build.op("cutset.reduce_scatter.default", y, "tensor", 0, (8, 8), 0)
    build.output(y, OutputKind.BOUNDARY, target=y.name)
    axes = (("tensor", (0, 1)),) if shared else ()
    return StageProgram(0, build.build(), ((y.name, (1,)),), (("h", 2),), axes)


def run_of(
    stage: StageProgram, copies: int = 2, compile: bool = False, device: torch.device = CPU
) -> BlockRun:
    functions: dict[str, Any] = stage_functions(HEAD + stage_source(0, stage.graph), "<block>")
    kernels = block_kernels(functions["stage_0"], stage, device, compile)
    return BlockRun(stage, kernels, device, copies, cuda_graphs=True)


@pytest.mark.parametrize("shared", [False, True])
def test_all_phases_of_training_run(shared: bool) -> None:
    run = run_of(layer(Mode.TRAIN, shared=shared), copies=3)
    assert all(seconds > 0.0 for seconds in run.typical_seconds())
    (first, *_) = run._sets
    assert len(run._sets) == 3
    assert len(first.tangents) == 1
    assert not first.kept  # nothing outlives the last kernel


def test_weights_accumulate_in_each_copy_as_in_a_step() -> None:
    stage = layer(Mode.TRAIN)
    run = run_of(stage)
    run.seconds()
    own = run._sets[0]
    values = [value for value in stage.graph.values if value.kind is not ValueKind.RESULT]
    named = {value.name: tensor for value, tensor in zip(values, own.arguments, strict=True)}
    leaf = named["w"].clone().requires_grad_()
    out = torch.nn.functional.gelu(torch.nn.functional.linear(named["h"], leaf))
    (wanted,) = torch.autograd.grad(out, leaf, own.tangents[0])
    (gradient,) = own.gradients.values()
    torch.testing.assert_close(gradient, wanted)
    run.seconds()
    torch.testing.assert_close(gradient, 2 * wanted)


@pytest.mark.parametrize("shared", [False, True])
def test_inference_has_a_forward_alone(shared: bool) -> None:
    forward, first, second = run_of(layer(Mode.INFER, shared=shared)).typical_seconds()
    assert forward > 0.0 == first == second


def test_workers_rest_for_a_part_of_what_each_phase_took(monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(layer(Mode.TRAIN, shared=False))
    rested: list[float] = []
    monkeypatch.setattr(profile_block.time, "sleep", rested.append)
    rows = run.runs(0.0, resting=0.5)
    assert len(rows) == profile_block._LEAST
    wanted = [0.5 * seconds * len(run._sets) for row in rows for seconds in row]
    assert rested[-len(wanted) :] == pytest.approx(wanted)
    rested.clear()
    run.runs(0.0)
    assert not rested


def test_made_up_tensors_are_legal() -> None:
    assert filled((2, 3), torch.bfloat16, CPU).dtype is torch.bfloat16
    assert filled((2,), torch.int64, CPU).tolist() == [1, 1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mode", list(Mode))
def test_on_cuda_replays_of_graphs_are_timed(mode: Mode) -> None:
    run = run_of(layer(mode), device=torch.device("cuda", 0))
    seconds = run.typical_seconds()
    assert (min(seconds) > 0.0) == (mode is Mode.TRAIN) and seconds[0] > 0.0
    assert run._slots is not None and all(run._slots.replays(own.slot) for own in run._sets)
