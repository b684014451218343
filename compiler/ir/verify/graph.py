"""Rules of a `Graph`: dense ids, unique names, single assignment, topological order, sane types,
operators that exist and change nothing in place, and outputs that the mode allows."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable

import torch

from ..errors import CaptureError, VerificationError
from ..graph import Graph, Mode, Node, Operand, Output, OutputKind, Value, ValueKind, operands
from ..ops import Op, resolve
from ..types import DTYPE_NAMES
from .report import check, fail_node, first_repeated

__all__ = ["verify_graph", "verify_graphs"]

_SCALARS = (
    int,
    float,
    str,
    type(None),
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
)


def verify_graph(graph: Graph, *, is_stage: bool = False) -> None:
    """Check every rule of the level.

    Args:
        graph: a whole model's graph, or with `is_stage` one stage of it, which may have BOUNDARY
            values and outputs and need not have a loss.

    Raises:
        VerificationError: the first rule that is broken, with node, module path and source line.
    """
    _verify_values(graph, is_stage)
    _verify_definitions(graph)
    defined = {value.id for value in graph.values if value.kind is not ValueKind.RESULT}
    for node in graph.nodes:
        _verify_inputs(graph, node, defined)
        _verify_operator(graph, node)
        defined.update(node.outputs)
    draws = Counter(node.random_draw for node in graph.nodes if node.random_draw is not None)
    for node in graph.nodes:
        if node.random_draw is not None and (draws[node.random_draw] > 1 or node.random_draw < 0):
            fail_node(graph, node, f"random draw {node.random_draw} is negative or used twice")
    for output in graph.outputs:
        _verify_output(graph, output, is_stage)
    _verify_results(graph, is_stage)


def verify_graphs(graphs: Iterable[Graph], *, is_stage: bool = False) -> None:
    """`verify_graph` of each. Of graphs that share their values and differ in arguments of a few
    nodes (equal parts on different ranks), what is shared is checked once."""
    known: dict[int, Graph] = {}  # by identity of the values
    for graph in graphs:
        twin = known.setdefault(id(graph.values), graph)
        if twin is graph or not _differ_in_arguments(graph, twin):
            verify_graph(graph, is_stage=is_stage)
            continue
        every = set(range(len(graph.values)))  # the order was checked: operands are those of twin
        for node, other in zip(graph.nodes, twin.nodes, strict=True):
            if node is not other:
                _verify_inputs(graph, node, every)
                _verify_operator(graph, node)


def _differ_in_arguments(one: Graph, two: Graph) -> bool:
    """Whether graphs of the same values differ in nothing else."""
    sides = [(g.name, g.mode, g.inputs, g.outputs, len(g.nodes)) for g in (one, two)]
    return sides[0] == sides[1] and all(
        a is b
        or (a.id, a.name, a.op, a.inputs, a.outputs, a.random_draw)
        == (b.id, b.name, b.op, b.inputs, b.outputs, b.random_draw)
        for a, b in zip(one.nodes, two.nodes, strict=True)
    )


def _verify_values(graph: Graph, is_stage: bool) -> None:
    place = f"graph {graph.name}"
    for position, value in enumerate(graph.values):
        here = f"value %{value.name} of {place}"
        check(value.id == position, f"value {position} has id {value.id}, not {position}", here)
        check(bool(value.name), "a value has no name", f"value {position} of {place}")
        _verify_type(value, here)
        if value.kind is ValueKind.BOUNDARY:
            check(is_stage, "a whole model's graph has a boundary value", here)
    repeated = first_repeated(value.name for value in graph.values)
    check(repeated is None, f"two values are called %{repeated}", place)
    given = [value.id for value in graph.values_of(ValueKind.INPUT)]
    check(
        sorted(graph.inputs) == given,
        f"inputs are values {list(graph.inputs)}, but the values of kind input are {given}",
        place,
    )


def _verify_type(value: Value, here: str) -> None:
    shape = value.type.shape
    check(value.type.dtype in DTYPE_NAMES, f"dtype {value.type.dtype} is not supported", here)
    check(
        all(type(size) is int and size >= 0 for size in shape),
        f"shape {shape} has a size that is not a natural number",
        here,
    )
    check(
        value.type.is_float or not value.requires_grad,
        f"{value.type} requires a gradient but is not floating-point",
        here,
    )
    check(
        value.batch_dim is None or 0 <= value.batch_dim < len(shape),
        f"batch dim {value.batch_dim} does not exist in {value.type}",
        here,
    )


def _verify_definitions(graph: Graph) -> None:
    """Dense node ids, unique node names, and every RESULT assigned exactly once."""
    for position, node in enumerate(graph.nodes):
        if node.id != position:
            raise VerificationError(
                f"node {position} has id {node.id}, not {position}",
                where=f"node {node.name} of graph {graph.name}",
            )
        for value in node.outputs:
            if not 0 <= value < len(graph.values):
                raise VerificationError(
                    f"result {value} is not one of the {len(graph.values)} values",
                    where=f"node {node.name} ({node.op.name}) of graph {graph.name}",
                )
    repeated = first_repeated(node.name for node in graph.nodes)
    check(repeated is None, f"two nodes are called {repeated}", f"graph {graph.name}")
    assigned: set[int] = set()
    for node in graph.nodes:
        for value in node.outputs:
            name = graph.values[value].name
            if graph.values[value].kind is not ValueKind.RESULT:
                kind = graph.values[value].kind.value
                fail_node(graph, node, f"the node assigns %{name}, which is a {kind}")
            if value in assigned:
                fail_node(graph, node, f"%{name} is assigned twice")
            assigned.add(value)
    for entry in graph.values_of(ValueKind.RESULT):
        here = f"value %{entry.name} of graph {graph.name}"
        check(entry.id in assigned, "no node computes this result", here)


def _verify_inputs(graph: Graph, node: Node, defined: set[int]) -> None:
    for value in node.inputs:
        if not 0 <= value < len(graph.values):
            fail_node(graph, node, f"input {value} is not one of the {len(graph.values)} values")
        if value not in defined:
            name = graph.values[value].name
            fail_node(graph, node, f"%{name} is read before it is computed")
    values = (*node.args, *(item for _, item in node.kwargs))
    if not all(map(_is_attribute, values)):
        fail_node(graph, node, "an argument is of no type that an attribute may have")
    if len({key for key, _ in node.kwargs}) < len(node.kwargs):
        fail_node(graph, node, "a keyword argument is given twice")
    order = tuple(dict.fromkeys(item.index for item in operands(values)))
    if order != tuple(range(len(node.inputs))):
        fail_node(
            graph,
            node,
            f"operands appear in order {list(order)}, but the node has {len(node.inputs)} inputs, "
            "which must be numbered in order of first appearance",
        )
    if len(set(node.inputs)) < len(node.inputs):
        fail_node(graph, node, "an input is listed twice")


def _is_attribute(item: object) -> bool:
    if isinstance(item, tuple):
        return all(map(_is_attribute, item))
    return isinstance(item, (Operand, *_SCALARS))


@functools.cache
def _signature(op: Op) -> tuple[int | None, bool]:
    """(number of tensors returned or None if it varies, whether it changes its arguments)."""
    schema = resolve(op)._schema
    kinds = [str(result.type) for result in schema.returns]
    fixed = all(kind == "Tensor" for kind in kinds)
    return (len(kinds) if fixed else None), schema.is_mutable


def _verify_operator(graph: Graph, node: Node) -> None:
    try:
        num_results, mutates = _signature(node.op)
    except CaptureError as error:
        fail_node(graph, node, error.cause)
    if mutates:
        fail_node(graph, node, f"{node.op} changes its arguments; graphs are functional")
    if num_results is not None and num_results != len(node.outputs):
        fail_node(graph, node, f"{node.op} returns {num_results} tensors, not {len(node.outputs)}")
    if any(graph.values[value].requires_grad for value in node.outputs) and not any(
        graph.values[value].requires_grad for value in node.inputs
    ):
        fail_node(graph, node, "a result requires a gradient, but no input does")


def _verify_output(graph: Graph, output: Output, is_stage: bool) -> None:
    here = f"{output.kind.value} output {output.target!r} of graph {graph.name}"
    check(0 <= output.value < len(graph.values), f"value {output.value} does not exist", here)
    value = graph.values[output.value]
    check(
        output.batch_dim is None or 0 <= output.batch_dim < len(value.type.shape),
        f"batch dim {output.batch_dim} does not exist in %{value.name}: {value.type}",
        here,
    )
    if output.kind is OutputKind.USER:
        check(output.target.isdigit(), f"{output.target!r} is not a position", here)
    if output.kind is OutputKind.BOUNDARY:
        check(is_stage, "a whole model's graph has a boundary output", here)
    if output.kind is OutputKind.LOSS:
        check(graph.mode is Mode.TRAIN, "an inference graph has a loss", here)
        check(
            value.type.shape == () and value.type.is_float,
            f"the loss %{value.name} is {value.type}, not a floating-point scalar",
            here,
        )
        check(value.requires_grad, f"the loss %{value.name} depends on no parameter", here)
    if output.kind is OutputKind.BUFFER:
        _verify_buffer_output(graph, output, here)


def _verify_buffer_output(graph: Graph, output: Output, here: str) -> None:
    type = graph.values[output.value].type
    buffers = {
        name: buffer
        for buffer in graph.values_of(ValueKind.BUFFER)
        for name in (buffer.origin, *buffer.aliases)
    }
    check(output.target in buffers, f"there is no buffer {output.target!r}", here)
    expected = buffers[output.target].type
    check(type == expected, f"the new content is {type}, the buffer {expected}", here)


def _verify_results(graph: Graph, is_stage: bool) -> None:
    """The outputs as a whole."""
    losses = len(graph.outputs_of(OutputKind.LOSS))
    place = f"graph {graph.name}"
    check(losses <= 1, f"the graph returns {losses} losses", place)
    if graph.mode is Mode.TRAIN and not is_stage:
        check(losses == 1, "a training graph returns no loss", place)
    for kind in (OutputKind.USER, OutputKind.BUFFER):
        targets = [output.target for output in graph.outputs_of(kind)]
        repeated = first_repeated(targets)
        check(repeated is None, f"two {kind.value} outputs have target {repeated!r}", place)
