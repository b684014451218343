"""Right graphs pass; each way of breaking one is caught and the place is named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from cutset.compiler.ir.errors import VerificationError
from cutset.compiler.ir.graph import Graph, Mode, Operand, Output, OutputKind, ValueKind
from cutset.compiler.ir.ops import op_named
from cutset.compiler.ir.types import TensorType
from cutset.compiler.ir.verify import verify_graph
from tests.ir.builders import GraphBuilder, mlp, residual, tied_embedding
from tests.ir.pipelines import make_programs, skip_graph


def node(graph: Graph, called: str, /, **changes: object) -> Graph:
    """`graph` with fields of one node replaced."""
    changed = [replace(n, **changes) if n.name == called else n for n in graph.nodes]
    return replace(graph, nodes=tuple(changed))


def value(graph: Graph, called: str, /, **changes: object) -> Graph:
    changed = [replace(v, **changes) if v.name == called else v for v in graph.values]
    return replace(graph, values=tuple(changed))


def output(graph: Graph, position: int, **changes: object) -> Graph:
    outputs = list(graph.outputs)
    outputs[position] = replace(outputs[position], **changes)
    return replace(graph, outputs=tuple(outputs))


def number(graph: Graph, name: str) -> int:
    return graph.by_name()[name].id


@pytest.mark.parametrize(
    "graph", [mlp(), mlp(mode=Mode.INFER), residual(), tied_embedding(), skip_graph()]
)
def test_right_graphs_pass(graph: Graph) -> None:
    verify_graph(graph)


def test_right_stage_graphs_pass() -> None:
    for program in make_programs():
        for stage in program.stages:
            verify_graph(stage.graph, is_stage=True)
            with pytest.raises(VerificationError, match="a whole model's graph has a boundary"):
                verify_graph(stage.graph)


def reorder(graph: Graph) -> Graph:
    """First two nodes swapped, with ids that fit."""
    first, second, *rest = graph.nodes
    return replace(graph, nodes=(replace(second, id=0), replace(first, id=1), *rest))


BROKEN: dict[str, tuple[Callable[[Graph], Graph], str]] = {
    "value id": (lambda g: value(g, "relu", id=1), "value 5 has id 1"),
    "value name taken": (lambda g: value(g, "relu", name="x"), "two values are called %x"),
    "value without name": (lambda g: value(g, "relu", name=""), "a value has no name"),
    "negative size": (
        lambda g: value(g, "relu", type=TensorType((-1, 8), torch.float32)),
        "not a natural number",
    ),
    "symbolic size": (
        lambda g: value(g, "relu", type=TensorType((4.5, 8), torch.float32)),
        "not a natural number",
    ),
    "unsupported dtype": (
        lambda g: value(g, "x", type=TensorType((4, 8), torch.float8_e5m2)),
        "is not supported",
    ),
    "gradient of integers": (
        lambda g: value(g, "x", type=TensorType((4, 8), torch.int64), requires_grad=True),
        "requires a gradient but is not floating-point",
    ),
    "batch dim of input": (lambda g: value(g, "x", batch_dim=2), "batch dim 2 does not exist"),
    "missing input": (lambda g: replace(g, inputs=g.inputs[:1]), "the values of kind input are"),
    "input twice": (lambda g: replace(g, inputs=(0, 0)), "the values of kind input are"),
    "boundary": (lambda g: value(g, "y", kind=ValueKind.BOUNDARY), "has a boundary value"),
    "node id": (lambda g: node(g, "relu", id=7), "node 1 has id 7"),
    "node name taken": (lambda g: node(g, "relu", name="linear"), "two nodes are called linear"),
    "result out of range": (lambda g: node(g, "relu", outputs=(99,)), "result 99 is not one of"),
    "assigns a parameter": (
        lambda g: node(g, "relu", outputs=(number(g, "layers_0_weight"),)),
        "assigns %layers_0_weight, which is a parameter",
    ),
    "assigned twice": (
        lambda g: node(g, "relu_1", outputs=(number(g, "relu"),)),
        "%relu is assigned twice",
    ),
    "never assigned": (lambda g: value(g, "x", kind=ValueKind.RESULT), "inputs are values"),
    "input out of range": (lambda g: node(g, "relu", inputs=(99,)), "input 99 is not one of"),
    "read before computed": (
        lambda g: node(g, "relu", inputs=(number(g, "relu_1"),)),
        "%relu_1 is read before it is computed",
    ),
    "reads itself": (
        lambda g: node(g, "relu", inputs=(number(g, "relu"),)),
        "%relu is read before it is computed",
    ),
    "order": (reorder, "%linear is read before it is computed"),
    "operand without input": (lambda g: node(g, "relu", args=(Operand(1),)), "operands appear"),
    "input without operand": (lambda g: node(g, "relu", args=()), "operands appear in order"),
    "operands out of order": (
        lambda g: node(g, "linear", args=(Operand(1), Operand(0), Operand(2))),
        "numbered in order of first appearance",
    ),
    "input listed twice": (
        lambda g: node(g, "linear", inputs=(0, 0, 2)),
        "an input is listed twice",
    ),
    "list attribute": (
        lambda g: node(g, "relu", args=(Operand(0), [1])),
        "no type that an attribute may have",
    ),
    "keyword twice": (
        lambda g: node(g, "relu", kwargs=(("a", 1), ("a", 2))),
        "a keyword argument is given twice",
    ),
    "unknown operator": (
        lambda g: node(g, "relu", op=op_named("aten.relv.default")),
        "has no operator aten.relv.default",
    ),
    "in-place operator": (
        lambda g: node(g, "relu", op=op_named("aten.relu_.default")),
        "changes its arguments",
    ),
    "too many results": (
        lambda g: node(g, "relu", op=op_named("aten.native_layer_norm.default")),
        "returns 3 tensors, not 1",
    ),
    "gradient from nowhere": (
        lambda g: value(
            value(g, "layers_0_weight", requires_grad=False), "layers_0_bias", requires_grad=False
        ),
        "a result requires a gradient, but no input does",
    ),
    "draw twice": (
        lambda g: node(node(g, "relu", random_draw=1), "relu_1", random_draw=1),
        "random draw 1 is negative or used twice",
    ),
    "output out of range": (lambda g: output(g, 0, value=99), "value 99 does not exist"),
    "output batch dim": (lambda g: output(g, 0, batch_dim=5), "batch dim 5 does not exist"),
    "output position": (lambda g: output(g, 0, target="first"), "'first' is not a position"),
    "outputs share a position": (
        lambda g: replace(g, outputs=(*g.outputs, g.outputs[0])),
        "two user outputs have target '0'",
    ),
    "loss is no scalar": (
        lambda g: output(g, 1, value=number(g, "relu")),
        "the loss %relu is f32[4,8], not a floating-point scalar",
    ),
    "loss without gradient": (
        lambda g: value(g, "mse_loss", requires_grad=False),
        "depends on no parameter",
    ),
    "two losses": (lambda g: replace(g, outputs=(*g.outputs, g.outputs[1])), "returns 2 losses"),
    "no loss": (lambda g: replace(g, outputs=g.outputs[:1]), "returns no loss"),
    "loss to infer": (lambda g: replace(g, mode=Mode.INFER), "an inference graph has a loss"),
    "boundary output": (
        lambda g: output(g, 0, kind=OutputKind.BOUNDARY),
        "a whole model's graph has a boundary output",
    ),
    "unknown buffer": (
        lambda g: output(g, 0, kind=OutputKind.BUFFER, target="mean"),
        "there is no buffer 'mean'",
    ),
}


@pytest.mark.parametrize("way", BROKEN)
def test_broken_graphs_are_caught(way: str) -> None:
    mutate, message = BROKEN[way]
    graph = mlp(2)
    broken = mutate(graph)
    assert broken != graph
    with pytest.raises(VerificationError) as caught:
        verify_graph(broken)
    assert message in caught.value.cause
    assert caught.value.where


def test_results_that_nobody_computes_are_caught() -> None:
    graph = mlp(1, mode=Mode.INFER)
    extra = replace(graph.values[-1], id=len(graph.values), name="ghost")
    with pytest.raises(VerificationError, match="no node computes this result"):
        verify_graph(replace(graph, values=(*graph.values, extra)))


def test_new_content_of_a_buffer_has_its_type() -> None:
    build = GraphBuilder("norm")
    x = build.input("x", (4, 8))
    mean = build.buffer("norm.mean", (8,))
    new = build.op("aten.mean.dim", x, [0])
    build.output(new, OutputKind.BUFFER, target="norm.mean", batch_dim=None)
    right = build.build()
    verify_graph(right)
    wrong = replace(right, outputs=(Output(OutputKind.BUFFER, x.id, "norm.mean"),))
    with pytest.raises(VerificationError, match=r"is f32\[4,8\], the buffer f32\[8\]"):
        verify_graph(wrong)
    twice = replace(right, outputs=(*right.outputs, *right.outputs))
    with pytest.raises(VerificationError, match=r"two buffer outputs have target 'norm\.mean'"):
        verify_graph(twice)
    assert mean.kind is ValueKind.BUFFER


def test_the_error_names_node_module_and_source_line() -> None:
    broken = node(mlp(2), "linear_1", op=op_named("aten.linear_.default"))
    with pytest.raises(VerificationError) as caught:
        verify_graph(broken)
    assert caught.value.where == (
        "node linear_1 of module layers.1 (model.py:7) in graph mlp: %linear_1: f32[4,8] grad = "
        "aten.linear_.default(%relu, %layers_1_weight, %layers_1_bias) module=layers.1"
    )
