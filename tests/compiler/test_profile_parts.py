"""What is measured as one: every node once, equal parts once."""

from __future__ import annotations

import pytest

from cutset.compiler.block_times import copies_of
from cutset.compiler.ir.graph import Graph, Mode
from cutset.compiler.ir.mesh import Mesh
from cutset.compiler.profile_parts import Part, parts_of
from tests.ir.builders import mlp, residual, tied_embedding

NO_MESH = Mesh(())


def num_nodes(parts: tuple[Part, ...]) -> int:
    return sum(part.count * len(part.nodes) for part in parts)


@pytest.mark.parametrize(
    "graph",
    [mlp(3, mode=Mode.TRAIN), mlp(3, mode=Mode.INFER), residual(), tied_embedding()],
    ids=lambda graph: f"{graph.name}-{graph.mode.value}",
)
def test_parts_cover_the_graph(graph: Graph) -> None:
    for kind in ("blocks", "ops"):
        parts = parts_of(graph, NO_MESH, kind)
        measured = {node for part in parts for node in part.nodes}
        assert 0 < len(measured) <= num_nodes(parts) <= len(graph.nodes)
        assert len({part.digest for part in parts}) == len(parts)
        for part in parts:
            names = [graph.nodes[node].op for node in part.nodes]
            assert [node.op for node in part.stage.graph.nodes] == names


def test_layers_are_one_part_however_many_there_are() -> None:
    few, many = (parts_of(mlp(layers, mode=Mode.TRAIN), NO_MESH, "blocks") for layers in (4, 9))
    assert {part.digest for part in few} == {part.digest for part in many}
    assert max(part.count for part in many) >= max(part.count for part in few) + 5


def test_shapes_gradients_and_mode_tell_parts_apart() -> None:
    digests = [
        {part.digest for part in parts_of(graph, NO_MESH, "blocks")}
        for graph in (
            mlp(4, mode=Mode.TRAIN),
            mlp(4, mode=Mode.INFER),
            mlp(4, batch=16, mode=Mode.TRAIN),
            mlp(4, width=64, mode=Mode.TRAIN),
        )
    ]
    for index, own in enumerate(digests):
        for other in digests[index + 1 :]:
            assert not own & other


def test_the_first_layer_computes_no_gradient_of_its_input() -> None:
    parts = parts_of(mlp(4, mode=Mode.TRAIN), NO_MESH, "ops")
    products = [part for part in parts if part.stage.graph.nodes[0].op.packet == "linear"]
    assert sorted(part.count for part in products) == [1, 3]


def test_a_part_is_a_stage_of_its_own() -> None:
    part = parts_of(mlp(4, mode=Mode.TRAIN), Mesh.parse("data=2,tensor=4"), "blocks")[0]
    assert part.stage.axes == (("data", (0, 1)), ("tensor", (0, 1, 2, 3)))


def test_copies_of_a_part_are_more_than_caches_hold() -> None:
    part = parts_of(mlp(4, width=1024, mode=Mode.TRAIN), NO_MESH, "blocks")[0]
    size = sum(value.type.num_bytes for value in part.stage.graph.values)
    counts = {backend: copies_of(part, backend) for backend in ("cpu", "cuda")}
    assert counts["cpu"] * size >= 32 << 20 and 1 < counts["cpu"] < counts["cuda"] <= 16
