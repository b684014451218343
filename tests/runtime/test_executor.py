"""Ranks run by turns in one process train exactly as the whole graph does."""

from __future__ import annotations

import pytest
import torch

from cutset.compiler.codegen.programs import generate_programs
from cutset.compiler.codegen.python import emit_python
from cutset.compiler.ir.graph import Graph
from cutset.compiler.ir.program import Program
from cutset.compiler.ir.text import print_program
from cutset.runtime.inprocess import InProcessSession
from cutset.runtime.optimizer import OptimizerSpec
from tests.codegen.test_programs import ROWS, plan_of, schedule, skip_model, three_stages

GPIPE = ["F0.0 F0.1 B0.0 B0.1", "F1.0 F1.1 B1.0 B1.1", "F2.0 F2.1 B2.0 B2.1"]
SPEC = OptimizerSpec(
    "torch.optim.sgd:SGD", ((("w", "v"), {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),)
)


def started(graph: Graph, rows: list[str], clip: float | None) -> InProcessSession:
    plan = plan_of(graph, three_stages(), schedule(rows, 3, 2))
    programs = generate_programs(graph, plan, plan_hash="hash", clip_grad_norm=clip)
    session = InProcessSession(3)
    torch.manual_seed(0)
    tensors = {"w": torch.randn(8, 8), "v": torch.randn(8, 8)}
    session.call(
        "set_tensors", [{"tensors": held(p, tensors), "parameters": ["w", "v"]} for p in programs]
    )
    session.call("configure_optimizer", {"spec": SPEC})
    session.call(
        "load",
        [{"key": "k", "program": print_program(p), "source": emit_python(p)} for p in programs],
    )
    return session


def held(program: Program, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    names = {value.origin for stage in program.stages for value in stage.graph.values}
    return {name: tensor for name, tensor in tensors.items() if name in names}


def reference(batches: list[torch.Tensor], clip: float | None) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    w, v = (torch.nn.Parameter(torch.randn(8, 8)) for _ in range(2))
    optimizer = torch.optim.SGD([w, v], **SPEC.groups[0][1])
    for batch in batches:
        optimizer.zero_grad()
        for x in batch.split(2):
            a = x @ w.T
            ((a + (a @ v.T) @ w.T).mean() / 2).backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_([w, v], clip)
        optimizer.step()
    return {"w": w.detach(), "v": v.detach()}


@pytest.mark.parametrize("rows", [ROWS, GPIPE], ids=["split", "whole"])
@pytest.mark.parametrize("clip", [None, 0.05], ids=["free", "clipped"])
def test_three_steps_give_the_weights_of_the_whole_model(
    rows: list[str], clip: float | None
) -> None:
    session = started(skip_model(), rows, clip)
    batches = [torch.randn(4, 8) for _ in range(3)]
    for step, batch in enumerate(batches):
        arguments = [
            {
                "key": "k",
                "inputs": {"args[0]": batch},
                "weights": (0.5, 0.5),
                "seed": 0,
                "step": step,
                "hyperparameters": tuple(options for _, options in SPEC.groups),
            }
        ] * 3
        session.call("train_step", arguments)
    expected = reference(batches, clip)
    for rank in session.ranks:
        for name, tensor in rank.tensors(names=["w", "v"]).items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)
    assert torch.equal(
        session.ranks[0].tensors(names=["w"])["w"], session.ranks[2].tensors(names=["w"])["w"]
    )


def test_a_rehearsal_leaves_nothing_behind() -> None:
    batch, losses = torch.randn(4, 8), []
    for rehearsed in (False, True):
        session = started(skip_model(), ROWS, None)
        arguments = {
            "key": "k",
            "inputs": {"args[0]": batch},
            "weights": (0.5, 0.5),
            "seed": 0,
            "step": 0,
            "hyperparameters": tuple(options for _, options in SPEC.groups),
        }
        if rehearsed:
            for rank in session.ranks:
                rank.begin_train_step(**arguments).rehearse()
        session.call("train_step", arguments)
        losses.append(session.ranks[0].tensors(names=["w"])["w"])
    assert torch.equal(*losses)


def test_microbatches_in_flight_follow_from_the_schedule() -> None:
    plan = plan_of(skip_model(), three_stages(), schedule(ROWS, 3, 2))
    programs = generate_programs(skip_model(), plan, plan_hash="hash")
    assert [program.most_in_flight(index) for index, program in enumerate(programs)] == [2, 2, 1]
