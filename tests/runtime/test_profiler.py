"""Workers that measure: what memory does not suffice for is told, and the next part is measured."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

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
CUDA = torch.device("cuda", 0)
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


def node_arguments(program: Program) -> dict[str, Any]:
    return {**arguments(program), "seconds": 0.01, "cuda_graphs": True}


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
    reason = worker.time_nodes(**node_arguments(program))
    assert isinstance(reason, str)
    assert reason.startswith(program.stages[0].graph.nodes[0].name) and "allocate" in reason
    found = worker.time_nodes(**node_arguments(outer_product(Mode.INFER, 8)))
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
    seconds = profiler().time_nodes(**node_arguments(own))
    assert not isinstance(seconds, str)
    *nodes, unsteady = seconds
    assert len(nodes) == len(kept)
    assert all(item > 0.0 for item in nodes) and unsteady >= 0.0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_operators_of_a_cuda_device_share_what_a_run_takes(cuda_graphs: bool) -> None:
    """A long chain of small operators takes less as a graph; large ones take most of the time."""
    build = GraphBuilder("chain", Mode.INFER)
    wide = build.input("wide", (4096, 4096))
    products = [build.op("aten.mm.default", wide, wide) for _ in range(2)]
    small = build.input("small", (8,))
    for _ in range(100):
        small = build.op("aten.relu.default", small)
    build.output(small)
    build.output(products[-1])
    graph = build.build()
    stages = cut_stages(graph, tuple(Stage(node.id, (0,), (node.id,)) for node in graph.nodes))
    program = Program.unscheduled(graph.mode, stages)
    worker = Profiler(0, 1, CUDA, LocalNetwork(1).communicator(0, CUDA))
    seconds = worker.time_nodes(**{**node_arguments(program), "cuda_graphs": cuda_graphs})
    assert not isinstance(seconds, str)
    products, relus = seconds[:2], seconds[2:-1]
    assert min(products) > 5 * max(sorted(relus)[:90])
    assert sum(relus) / len(relus) < (5e-6 if cuda_graphs else 50e-6)
