"""Collectives inside stages on a GPU: over NCCL (also compiled, and in CUDA graphs) and gloo."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, linear

from cutset.compiler.codegen.python import emit_python
from cutset.compiler.ir.graph import Graph, Mode
from cutset.compiler.ir.program import Backward, Forward, OptimizerStep, Program, StageProgram
from cutset.compiler.ir.text import print_program
from cutset.runtime.inprocess import InProcessSession
from cutset.runtime.launcher import launch_local
from tests.ir.builders import GraphBuilder
from tests.runtime.tensor_parallel import check_step, load_arguments

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
GPU = torch.device("cuda", 0)
STEPS = 4  # eager, captured, replayed


class OnHost:
    """A session whose replies are on the CPU."""

    def __init__(self, session: Any) -> None:
        self._session = session

    def call(self, *arguments: Any) -> list[Any]:
        def moved(reply: Any) -> Any:
            if not isinstance(reply, dict):
                return reply
            return {k: v.cpu() if isinstance(v, Tensor) else v for k, v in reply.items()}

        return [moved(reply) for reply in self._session.call(*arguments)]


def every_collective(dtype: torch.dtype) -> Graph:
    """All of them over an axis of one rank, as one GPU can be in an NCCL group once only."""
    build = GraphBuilder("every", Mode.TRAIN)
    x = build.input("x", (6, 8), dtype)
    w = build.parameter("w", (8, 8), dtype)
    h = build.op("cutset.sum_gradient.default", x, "t")
    h = build.op("cutset.all_reduce.default", build.op("aten.linear.default", h, w), "t", "sum")
    h = build.op("cutset.reduce_scatter.default", h, "t", 1, (8,), 0)
    h = build.op("aten.gelu.default", h)
    h = build.op("cutset.all_to_all.default", h, "t", 1, (8,), 0, (6,), 0)
    h = build.op("aten.linear.default", h, w)
    h = build.op("cutset.all_gather.default", h, "t", 0, (6,), 0, True)
    build.loss(build.op("aten.mean.default", build.op("aten.mul.Tensor", h, h)))
    return build.build()


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_nccl(compile: bool, dtype: torch.dtype) -> None:
    stage = StageProgram(0, every_collective(dtype), (), (), (("t", (0,)),))
    program = Program(
        rank=0,
        num_ranks=1,
        mode=Mode.TRAIN,
        num_microbatches=2,
        stages=(stage,),
        stage_ranks=(0,),
        instructions=(*(k(0, m) for m in range(2) for k in (Forward, Backward)), OptimizerStep()),
        plan_hash="hand",
        memory_limit_bytes=0,
    )
    source = {"program": print_program(program), "source": emit_python(program)}
    w = torch.randn(8, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    launched = launch_local(1, backend="nccl", devices=[GPU], timeout_seconds=60.0)
    session = OnHost(launched)
    session.call("load", {"key": "k", "compile": compile, **source})
    session.call("set_tensors", {"tensors": {"w": w}, "parameters": ["w"]})
    tolerance = 1e-12 if dtype is torch.float64 else 2e-2
    for step in range(STEPS):
        x = torch.randn(12, 8, generator=torch.Generator().manual_seed(step)).to(dtype)
        call = {"key": "k", "inputs": {"args[0]": x}, "weights": (0.5, 0.5), "seed": 0}
        options = {"step": step, "hyperparameters": (), "keep_gradients": True}
        session.call("train_step", call | options)
        (found,) = session.call("gradients", {"names": ["w"]})
        leaf = w.to(torch.float64, copy=True).requires_grad_()
        linear(gelu(linear(x.double(), leaf)), leaf).square().mean().backward()
        assert leaf.grad is not None
        error = (found["w"].double() - leaf.grad).abs().max() / leaf.grad.abs().max()
        assert error < tolerance
    launched.close()


@pytest.mark.parametrize("compile", [False, True])
def test_gloo_between_ranks_on_a_gpu(compile: bool) -> None:
    launched = launch_local(4, backend="gloo", devices=[GPU] * 4, timeout_seconds=60.0)
    session = OnHost(launched)
    session.call("load", load_arguments(compile=compile))
    for step in range(STEPS):
        check_step(session, step)
    launched.close()


def test_in_one_process() -> None:
    session = OnHost(InProcessSession(4, GPU))
    session.call("load", load_arguments())
    for step in range(STEPS):
        check_step(session, step)
