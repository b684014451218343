"""Programs that a rank loads."""

from __future__ import annotations

import functools

import pytest
import torch

from cutset.compiler.codegen.programs import generate_programs
from cutset.compiler.codegen.python import emit_python
from cutset.compiler.ir.graph import Graph, Mode
from cutset.compiler.ir.plan import Stage
from cutset.compiler.ir.text import print_program
from cutset.runtime.inprocess import InProcessSession
from tests.codegen.test_programs import plan_of, schedule
from tests.ir.builders import GraphBuilder


def scaled(factor: float) -> Graph:
    build = GraphBuilder("scaled", Mode.INFER)
    x = build.input("x", (2, 8))
    build.output(build.op("aten.mul.Tensor", x, factor))
    return build.build()


def test_each_loaded_program_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many there are: torch gives up on code that it has compiled often."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    session = InProcessSession(1)
    x = torch.randn(2, 8)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for number in range(3):
            graph = scaled(float(number))
            plan = plan_of(graph, (Stage(0, (0,), (0,)),), schedule(["F0.0"], 1, 1))
            (program,) = generate_programs(graph, plan, plan_hash="hash")
            load = {"program": print_program(program), "source": emit_python(program)}
            session.call("load", {"key": str(number), "compile": True, **load})
            call = {"key": str(number), "inputs": {"args[0]": x}, "weights": (1.0,)}
            (reply,) = session.call("infer", call)
            assert torch.equal(reply["outputs"]["0"], x * number)
