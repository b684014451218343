"""A small MLP over two stages of two ranks each, as hand-made local graphs and programs.

Stage 0 (ranks 0 and 1) splits its hidden features unevenly, stage 1 (ranks 2 and 3) the rows
of its weight; the boundary between them is whole on both ranks of a stage.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, linear, mse_loss

from cutset.compiler.codegen.python import emit_python
from cutset.compiler.ir.graph import Graph, Mode, OutputKind
from cutset.compiler.ir.program import (
    Backward,
    BackwardInput,
    BackwardWeight,
    Forward,
    Free,
    Instruction,
    OptimizerStep,
    Program,
    Recv,
    Register,
    Send,
    StageProgram,
)
from cutset.compiler.ir.text import print_program
from cutset.compiler.ir.types import TensorType
from tests.ir.builders import GraphBuilder

__all__ = ["check_step", "load_arguments", "programs", "whole_weights"]

F64 = torch.float64
HIDDEN = (3, 2)  # of 5 features
ROWS = (2, 2)  # of 4
TYPE = TensorType((2, 4), F64)


def whole_weights() -> dict[str, Tensor]:
    torch.manual_seed(0)
    shapes = {"up": (5, 6), "down": (4, 5), "bias": (4,), "head": (3, 4)}
    return {name: torch.randn(shape, dtype=F64) for name, shape in shapes.items()}


def part(name: str, tensor: Tensor, index: int) -> Tensor:
    """What rank `index` of an axis holds of a weight."""
    split = {"up": (HIDDEN, 0), "down": (HIDDEN, 1), "head": (ROWS, 1)}.get(name)
    return tensor if split is None else tensor.split(*split)[index].clone()


def first(index: int) -> Graph:
    """Column- then row-parallel; the bias, whole on each rank, counts once."""
    build = GraphBuilder("first", Mode.TRAIN)
    x = build.input("x", (2, 6), F64)
    up = build.parameter("up", (HIDDEN[index], 6), F64)
    down = build.parameter("down", (4, HIDDEN[index]), F64)
    bias = build.parameter("bias", (4,), F64)
    hidden = build.op("aten.gelu.default", build.op("aten.linear.default", x, up))
    once = build.op("cutset.as_partial.default", bias, index)
    term = build.op("aten.linear.default", hidden, down, once)
    h = build.op("cutset.all_reduce.default", term, "tensor", "sum", name="h")
    build.output(h, OutputKind.BOUNDARY, target="h")
    return build.build()


def second(index: int) -> Graph:
    """Row-parallel on a part of the input, whose gradient is gathered."""
    build = GraphBuilder("second", Mode.TRAIN)
    h = build.boundary("h", (2, 4), F64)
    target = build.input("y", (2, 3), F64, origin="targets[0]")
    head = build.parameter("head", (3, ROWS[index]), F64)
    own = build.op("cutset.shard.default", h, "tensor", 1, ROWS, index)
    term = build.op("aten.linear.default", own, head)
    out = build.op("cutset.all_reduce.default", term, "tensor", "sum")
    build.loss(build.op("aten.mse_loss.default", out, target))
    return build.build()


def programs() -> list[Program]:
    """1F1B over two microbatches, the second stage with a split backward."""
    found = []
    for rank in range(4):
        stage, index = divmod(rank, 2)
        graph = (first if stage == 0 else second)(index)
        axes = (("tensor", (0, 1) if stage == 0 else (2, 3)),)
        consumers = (("h", (1,)),) if stage == 0 else ()
        producers = () if stage == 0 else (("h", 0),)
        found.append(
            Program(
                rank=rank,
                num_ranks=4,
                mode=Mode.TRAIN,
                num_microbatches=2,
                stages=(StageProgram(stage, graph, consumers, producers, axes),),
                stage_ranks=(0, 2),
                instructions=tuple(_front(rank + 2) if stage == 0 else _back(rank - 2)),
                plan_hash="hand",
                memory_limit_bytes=0,
            )
        )
    return found


def _front(peer: int) -> list[Instruction]:
    items: list[Instruction] = []
    for m in range(2):
        items += [Recv(Register("h", m, 1), peer, 2 + m, TYPE)]
    for m in range(2):
        items += [Forward(0, m), Send(Register("h", m), peer, m, TYPE), Free((Register("h", m),))]
    for m in range(2):
        items += [Backward(0, m), Free((Register("h", m, 1),))]
    return [*items, OptimizerStep()]


def _back(peer: int) -> list[Instruction]:
    items: list[Instruction] = [Recv(Register("h", m), peer, m, TYPE) for m in range(2)]
    for m in range(2):
        gradient = Register("h", m, 1)
        items += [Forward(1, m), BackwardInput(1, m), Send(gradient, peer, 2 + m, TYPE)]
        items += [BackwardWeight(1, m), Free((Register("h", m), gradient))]
    return [*items, OptimizerStep()]


def load_arguments(**options: Any) -> list[dict[str, Any]]:
    return [
        {"key": "k", "program": print_program(p), "source": emit_python(p), **options}
        for p in programs()
    ]


def check_step(session: Any, step: int = 0) -> None:
    """One step of a loaded session: loss and gradients are those of the whole model."""
    weights = whole_weights()
    held = [
        {name: part(name, weights[name], rank % 2) for name in names}
        for rank, names in enumerate([("up", "down", "bias")] * 2 + [("head",)] * 2)
    ]
    session.call(
        "set_tensors", [{"tensors": tensors, "parameters": list(tensors)} for tensors in held]
    )
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(4, 6, dtype=F64, generator=generator)
    y = torch.randn(4, 3, dtype=F64, generator=generator)
    arguments = {
        "key": "k",
        "inputs": {"args[0]": x, "targets[0]": y},
        "weights": (0.5, 0.5),
        "seed": 0,
        "step": step,
        "hyperparameters": (),
        "keep_gradients": True,
    }
    replies = session.call("train_step", arguments)
    gradients = session.call("gradients", [{"names": list(tensors)} for tensors in held])
    loss, expected = reference(weights, x, y)
    for rank, tensors in enumerate(held):
        if rank >= 2:
            assert replies[rank]["loss"] == pytest.approx(loss, rel=1e-13)
        assert set(gradients[rank]) == set(tensors)
        for name, gradient in gradients[rank].items():
            whole = part(name, expected[name], rank % 2)
            torch.testing.assert_close(gradient, whole, rtol=1e-13, atol=1e-14)


def reference(
    weights: Mapping[str, Tensor], x: Tensor, y: Tensor
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of the whole model."""
    leaf = {name: tensor.clone().requires_grad_() for name, tensor in weights.items()}
    h = linear(gelu(linear(x, leaf["up"])), leaf["down"], leaf["bias"])
    loss = mse_loss(linear(h, leaf["head"]), y)
    found = torch.autograd.grad(loss, list(leaf.values()))
    return loss.item(), dict(zip(leaf, found, strict=True))
