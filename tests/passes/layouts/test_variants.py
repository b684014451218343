from __future__ import annotations

import pytest

from cutset.compiler.ir.blocks import find_blocks
from cutset.compiler.ir.graph import Graph, Mode
from cutset.compiler.ir.mesh import Mesh
from cutset.compiler.ir.verify import verify_graph
from cutset.passes.layouts.classes import node_classes
from cutset.passes.layouts.variants import Variant, block_graph, block_variants
from tests.ir.builders import GraphBuilder

from .test_choose import cluster


def _stack(layers: int) -> Graph:
    """Residual layers of two linear nodes and an activation."""
    build = GraphBuilder("stack", Mode.TRAIN)
    hidden = build.input("x", (4, 8, 16))
    for layer in range(layers):
        path = f"layers.{layer}"
        wide = build.parameter(f"{path}.up", (32, 16))
        narrow = build.parameter(f"{path}.down", (16, 32))
        x = build.op("aten.linear.default", hidden, wide, module=path)
        x = build.op("aten.gelu.default", x, module=path)
        x = build.op("aten.linear.default", x, narrow, module=path)
        hidden = build.op("aten.add.Tensor", hidden, x, module=path)
    build.loss(build.op("aten.sum.default", hidden))
    return build.build()


@pytest.fixture(scope="module")
def variants() -> tuple[Variant, ...]:
    graph = _stack(4)
    (block,) = find_blocks(graph)
    nodes = block.instances[1].nodes
    return block_variants(graph, nodes, Mesh.parse("tensor=2"), cluster(2, 1e9), range(2))


def test_block_is_a_legal_graph() -> None:
    graph = _stack(3)
    (block,) = find_blocks(graph)
    cut = block_graph(graph, block.instances[1].nodes)
    verify_graph(cut, is_stage=True)
    assert [node.op for node in cut.nodes] == [graph.nodes[n].op for n in block.instances[1].nodes]


def test_no_variant_beats_another(variants: tuple[Variant, ...]) -> None:
    assert not any(a.beats(b) for a in variants for b in variants)


def test_recomputation_trades_seconds_for_bytes(variants: tuple[Variant, ...]) -> None:
    for boundary in {item.boundary for item in variants}:
        mine = [item for item in variants if item.boundary == boundary]
        whole = min(mine, key=lambda item: item.saved_bytes)
        fastest = min(mine, key=lambda item: item.seconds)
        assert whole.recomputed and not fastest.recomputed
        assert whole.saved_bytes < fastest.saved_bytes
        assert whole.seconds > fastest.seconds


def test_recomputing_all_keeps_what_comes_in(variants: tuple[Variant, ...]) -> None:
    received = 4 * 8 * 16 * 4
    lean = [item.saved_bytes for item in variants if len(item.recomputed) == 4]
    assert lean and all(saved in (received, received // 2) for saved in lean)


def test_equal_layers_decide_together_up_to_a_period_of_two() -> None:
    few, many = node_classes(_stack(4)), node_classes(_stack(40))
    assert len(few) == len(many) == 3 * 4 + 1  # the first layer has no gradient to return
    assert sum(map(len, many)) == 40 * 4 + 1
