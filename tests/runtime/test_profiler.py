"""Workers that measure: what memory does not suffice for is told, and the next part is measured."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cutset.compiler.codegen.cut import cut_stages
from cutset.compiler.codegen.python import emit_python
from cutset.compiler.ir.graph import Mode, OutputKind
from cutset.compiler.ir.plan import Stage
from cutset.compiler.ir.program import Program, StageProgram
from cutset.compiler.ir.text import print_program
from cutset.runtime.local_communicator import LocalNetwork
from cutset.runtime.memory import if_it_fits
from cutset.runtime.profiler import Profiler
from tests.ir.builders import GraphBuilder

CPU = torch.device("cpu")
TOO_MANY = 1 << 25  # whose square no machine has in bytes


def profiler() -> Profiler:
    return Profiler(0, 1, CPU, LocalNetwork(1).communicator(0, CPU))


def outer_product(mode: Mode, count: int) -> Program:
    """A small column times a small row: their product alone is large."""
    build = GraphBuilder("outer", mode)
    column, row = build.parameter("column", (count, 1)), build.parameter("row", (1, count))
    product = build.op("aten.mul.Tensor", column, row)
    build.output(product, OutputKind.BOUNDARY, target=product.name)
    stage = StageProgram(0, build.build(), ((product.name, (1,)),), ())
    return Program.unscheduled(mode, (stage,))


def arguments(program: Program) -> dict[str, str]:
    return {"program": print_program(program), "source": emit_python(program)}


@pytest.mark.parametrize("mode", list(Mode))
def test_a_block_without_room_is_told_and_the_next_one_measured(mode: Mode) -> None:
    worker = profiler()
    how = {"copies": 1, "compile": False, "cuda_graphs": False}
    reason = worker.time_block(**arguments(outer_product(mode, TOO_MANY)), **how)  # type: ignore[arg-type]
    assert isinstance(reason, str) and "allocate" in reason
    seconds = worker.time_block(**arguments(outer_product(mode, 8)), **how)  # type: ignore[arg-type]
    assert not isinstance(seconds, str) and seconds[0] > 0.0


def test_an_operator_without_room_is_named() -> None:
    worker = profiler()
    program = outer_product(Mode.INFER, TOO_MANY)
    reason = worker.time_nodes(**arguments(program), seconds=0.01)
    assert isinstance(reason, str)
    assert reason.startswith(program.stages[0].graph.nodes[0].name) and "allocate" in reason
    found = worker.time_nodes(**arguments(outer_product(Mode.INFER, 8)), seconds=0.01)
    assert not isinstance(found, str) and len(found) == 2


def test_other_errors_stay_errors() -> None:
    def fails() -> None:
        raise RuntimeError("shapes do not match")

    def is_full() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore words")

    def is_full_too() -> None:
        raise MemoryError

    with pytest.raises(RuntimeError, match="shapes"):
        if_it_fits(fails, CPU)
    assert if_it_fits(is_full, CPU) == (None, "CUDA out of memory. Tried to allocate 2 GiB.")
    assert if_it_fits(is_full_too, CPU) == (None, "out of memory")
    assert if_it_fits(lambda: 3, CPU) == (3, "")


def branches() -> Program:
    """Three nodes: two branches of one input, and their sum."""
    build = GraphBuilder("branches", Mode.INFER)
    x = build.input("x", (4, 8))
    left = build.op("aten.relu.default", x)
    right = build.op("aten.linear.default", x, build.parameter("w", (8, 8)))
    build.output(build.op("aten.add.Tensor", left, right))
    graph = build.build()
    stages = cut_stages(graph, tuple(Stage(node.id, (0,), (node.id,)) for node in graph.nodes))
    return Program.unscheduled(graph.mode, stages)


@pytest.mark.parametrize("kept", [(0, 1, 2), (2,), (1, 2), ()])
def test_what_others_compute_is_made_up(kept: tuple[int, ...]) -> None:
    whole = branches()
    own = replace(whole, stages=tuple(whole.stages[index] for index in kept))
    seconds = profiler().time_nodes(**arguments(own), seconds=0.01)
    assert not isinstance(seconds, str)
    *nodes, unsteady = seconds
    assert len(nodes) == len(kept)
    assert all(item > 0.0 for item in nodes) and unsteady >= 0.0
