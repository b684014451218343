"""Fingerprints tell models apart, and structure hashes forget the sizes of the inputs."""

from __future__ import annotations

from dataclasses import replace

import torch

from cutset.compiler.ir.fingerprint import fingerprint, plan_hash
from cutset.compiler.ir.graph import Graph, Mode
from tests.ir.builders import GraphBuilder, mlp, residual, tied_embedding
from tests.ir.pipelines import make_plan, skip_graph


def sized(batch: int, length: int, *, dim: int = 1, width: int = 8, mask: float = 0.0) -> Graph:
    """A graph whose views, slices and factories depend on the sizes of its input."""
    build = GraphBuilder("sized", Mode.TRAIN)
    x = build.input("x", (batch, length, width))
    weight = build.parameter("w", (width, width))
    hidden = build.op("aten.linear.default", x, weight)
    positions = build.op("aten.arange.default", length, device=torch.device("cpu"))
    table = build.op("aten.full.default", (length, length), mask)
    hidden = build.op("aten.view.default", hidden, (batch * length, width))
    hidden = build.op("aten.reshape.default", hidden, (batch, length, width))
    hidden = build.op("aten.transpose.int", hidden, 0, dim)
    hidden = build.op("aten.slice.Tensor", hidden, 0, 0, min(batch, length))
    build.op("aten.expand.default", table, (batch, length, length))
    build.op("aten.add.Tensor", positions, 1)
    build.loss(build.op("aten.sum.default", hidden))
    return build.build()


def structure(graph: Graph) -> str:
    return fingerprint(graph, "M").structure_hash


def test_other_input_sizes_keep_the_structure_and_change_the_graph() -> None:
    one, other = (fingerprint(sized(*sizes), "M") for sizes in ((2, 5), (3, 7)))
    assert one.structure_hash == other.structure_hash
    assert one.graph_hash != other.graph_hash


def test_what_makes_another_model_changes_the_structure() -> None:
    base = structure(sized(2, 5))
    assert structure(sized(2, 5, dim=2)) != base  # dims are no sizes
    assert structure(sized(2, 5, width=4)) != base  # parameter shapes
    assert structure(mlp(2)) != structure(mlp(3))
    assert structure(mlp(2)) != structure(mlp(2, mode=Mode.INFER))
    graph = residual()
    renamed = tuple(replace(node, module_path="other") for node in graph.nodes)
    assert structure(replace(graph, nodes=renamed)) != structure(graph)
    more = tuple(
        replace(node, args=(node.args[0], 0.5, True)) if node.op.packet == "dropout" else node
        for node in graph.nodes
    )
    assert structure(replace(graph, nodes=more)) != structure(graph)


def test_source_lines_and_capture_device_do_not_count() -> None:
    graph = sized(2, 5)
    moved = tuple(
        replace(
            node,
            source="/home/someone/model.py:1",
            kwargs=tuple(
                (k, torch.device("cuda", 1) if k == "device" else v) for k, v in node.kwargs
            ),
        )
        for node in graph.nodes
    )
    assert moved != graph.nodes
    assert fingerprint(replace(graph, nodes=moved), "M") == fingerprint(graph, "M")


def test_tied_parameters_count_once() -> None:
    found = fingerprint(tied_embedding(), "Tied")
    assert (found.name, found.num_parameters, found.parameter_bytes) == ("Tied", 192, 768)


def test_plan_hash_forgets_solver_seconds_only() -> None:
    plan = make_plan(skip_graph())
    assert plan.certificate is not None
    slower = replace(plan, certificate=replace(plan.certificate, solver_seconds=9.0))
    other = replace(plan, certificate=replace(plan.certificate, solver="another"))
    assert plan_hash(slower) == plan_hash(plan)
    assert plan_hash(other) != plan_hash(plan)
    assert plan_hash(replace(plan, batch_size=9)) != plan_hash(plan)
