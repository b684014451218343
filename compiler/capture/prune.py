"""Remove from a graph what nothing needs: dead nodes and values, gradients that lead nowhere."""

from __future__ import annotations

from dataclasses import replace

from ..ir.graph import Graph, Node, OutputKind, ValueKind

__all__ = ["without_dead_code", "without_idle_gradients"]


def without_idle_gradients(graph: Graph) -> Graph:
    """Only values that the loss is differentiated through require a gradient, as in torch.

    What goes into `detach` alone has no gradient, which is not the same as one of zero: weight
    decay leaves such a parameter as it is.
    """
    reached = {output.value for output in graph.outputs_of(OutputKind.LOSS)}
    for node in reversed(graph.nodes):
        if any(value in reached and graph.values[value].requires_grad for value in node.outputs):
            reached.update(node.inputs)
    return replace(
        graph,
        values=tuple(
            replace(value, requires_grad=value.requires_grad and value.id in reached)
            for value in graph.values
        ),
    )


def without_dead_code(graph: Graph) -> Graph:
    """Only nodes and values that an output depends on, changed buffers, and all inputs.

    Ids stay dense.
    """
    changed = {output.target for output in graph.outputs_of(OutputKind.BUFFER)}
    needed = {output.value for output in graph.outputs}
    needed.update(item.id for item in graph.values_of(ValueKind.BUFFER) if item.origin in changed)
    kept: list[Node] = []
    for node in reversed(graph.nodes):
        if any(value in needed for value in node.outputs):
            needed.update(node.inputs)
            needed.update(node.outputs)
            kept.append(node)
    alive = [value for value in graph.values if value.id in needed or value.kind is ValueKind.INPUT]
    number = {value.id: position for position, value in enumerate(alive)}
    return replace(
        graph,
        values=tuple(replace(value, id=number[value.id]) for value in alive),
        nodes=tuple(
            replace(
                node,
                id=position,
                inputs=tuple(number[value] for value in node.inputs),
                outputs=tuple(number[value] for value in node.outputs),
            )
            for position, node in enumerate(reversed(kept))
        ),
        inputs=tuple(number[value] for value in graph.inputs),
        outputs=tuple(replace(output, value=number[output.value]) for output in graph.outputs),
    )
