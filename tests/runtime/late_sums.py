"""A stage whose weights are held in parts, and whose gradients are kept in parts (ZeRO 3)."""

from __future__ import annotations

import torch

from cutset.compiler.ir.graph import Graph, Mode, OutputKind
from cutset.runtime.collective_ops import StageCollectives
from cutset.runtime.communicator import Communicator
from cutset.runtime.kernels import StageKernels, trace_training
from tests.ir.builders import GraphBuilder
from tests.runtime.test_kernels import compile_stage

__all__ = ["F64", "LAYERS", "ROWS", "SIZE", "traced"]

CPU, F64 = torch.device("cpu"), torch.float64
LAYERS, ROWS, SIZE = 3, 5, 4


def layers(index: int) -> Graph:
    """Linear layers whose weights are held in halves (ZeRO 3); each rank has rows of its own."""
    build = GraphBuilder("layers", Mode.TRAIN)
    h = build.boundary("h", (ROWS, SIZE), F64)
    for number in range(LAYERS):
        part = build.parameter(f"w{number}", (SIZE // 2, SIZE), F64)
        sizes = (SIZE // 2, SIZE // 2)
        weight = build.op("cutset.all_gather.default", part, "data", 0, sizes, index, True)
        h = build.op("aten.linear.default", h, weight)
        h = build.op("aten.tanh.default", h)
    build.output(h, OutputKind.BOUNDARY, target=h.name)
    return build.build()


def traced(end: Communicator) -> StageKernels:
    graph = layers(end.rank)
    bound = StageCollectives(end, {"data": (0, 1)}, 0)
    return trace_training(compile_stage(graph), graph, CPU, bound)
