from __future__ import annotations

import time

import torch

from cutset.compiler.ir.blocks import find_blocks
from cutset.compiler.ir.graph import Graph, Mode
from tests.ir.builders import GraphBuilder


def _stack(widths: list[int], *, scale: float = 2.0) -> Graph:
    """Layers of a linear, a bias-free norm and a skip; `widths` are those inside the layers."""
    build = GraphBuilder("stack", Mode.TRAIN)
    hidden = build.input("x", (2, 8))
    for number, width in enumerate(widths):
        path = f"body.layers.{number}"
        up = build.parameter(f"{path}.up", (width, 8))
        down = build.parameter(f"{path}.down", (8, width))
        inner = build.op("aten.linear.default", hidden, up, module=f"{path}.mlp.up")
        inner = build.op("aten.mul.Tensor", inner, scale, module=f"{path}.mlp")
        inner = build.op("aten.linear.default", inner, down, module=f"{path}.mlp.down")
        hidden = build.op("aten.add.Tensor", hidden, inner, module=path)
    build.loss(build.op("aten.mean.default", hidden))
    return build.build()


def test_equal_layers_are_one_block() -> None:
    (block,) = find_blocks(_stack([16, 16, 16]))
    assert [item.path for item in block.instances] == [f"body.layers.{n}" for n in range(3)]
    assert [len(item.nodes) for item in block.instances] == [4, 4, 4]


def test_layers_of_other_shapes_are_other_blocks() -> None:
    first, second = find_blocks(_stack([16, 32, 16, 32, 24]))
    assert [item.path for item in first.instances] == ["body.layers.0", "body.layers.2"]
    assert [item.path for item in second.instances] == ["body.layers.1", "body.layers.3"]
    assert first.digest != second.digest


def test_digest_depends_on_attributes_and_not_on_the_rest_of_the_graph() -> None:
    (short,), (long,) = find_blocks(_stack([16, 16])), find_blocks(_stack([16] * 5))
    (other,) = find_blocks(_stack([16, 16], scale=3.0))
    assert short.digest == long.digest != other.digest


def test_integers_and_floats_are_told_apart() -> None:
    (whole,), (real,) = (find_blocks(_stack([16, 16], scale=scale)) for scale in (2, 2.0))
    assert whole.digest != real.digest


def test_graph_without_repetition_has_no_blocks() -> None:
    assert find_blocks(_stack([16])) == ()


def test_blocks_of_a_deep_graph_are_found_quickly() -> None:
    with torch.no_grad():
        graph = _stack([16] * 400)
    begin = time.perf_counter()
    (block,) = find_blocks(graph)
    assert len(block.instances) == 400
    assert time.perf_counter() - begin < 1.0
