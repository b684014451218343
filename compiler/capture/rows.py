"""Let linear layers work on rows where they lie, without flattening what the rows are counted by.

`nn.MultiheadAttention` computes its output projection as `view(linear(view(x, (steps * batch,
features))), (steps, batch, features))`. In the flat rows the batch is no dim any more, so that the
batch could not be sharded there without moving it. A linear layer maps each row on its own:
flattened or not, it computes the same.
"""

from __future__ import annotations

from dataclasses import replace

from ..ir.graph import Graph, Node, Operand, producers, users
from ..ir.types import TensorType

__all__ = ["keep_rows"]

_VIEWS = {"aten.view.default", "aten._unsafe_view.default", "aten.reshape.default"}


def keep_rows(graph: Graph) -> Graph:
    """The graph with `view, linear, view` such that the linear has the last view's leading dims.

    The first view makes them, the last has nothing left to do; ids stay.
    """
    made_by, read_by = producers(graph), users(graph)
    returned = {output.value for output in graph.outputs}
    values, nodes = list(graph.values), list(graph.nodes)

    def only_reader(value: int) -> Node | None:
        readers = read_by[value]
        return graph.nodes[readers[0]] if len(readers) == 1 and value not in returned else None

    for node in graph.nodes:
        if node.op.name != "aten.linear.default" or node.inputs[0] not in made_by:
            continue
        (result,) = node.outputs
        first, last = graph.nodes[made_by[node.inputs[0]]], only_reader(result)
        if last is None or only_reader(node.inputs[0]) is not node:
            continue
        shape = graph.values[last.outputs[0]].type.shape
        flat = graph.values[result].type.shape
        if not {first.op.name, last.op.name} <= _VIEWS or shape[-1:] != flat[-1:]:
            continue
        if len(shape) > len(flat) > 1:
            for value in (node.inputs[0], result):
                features = values[value].type.shape[-1]
                type = TensorType((*shape[:-1], features), values[value].type.dtype)
                values[value] = replace(values[value], type=type)
            rows = values[node.inputs[0]].type.shape
            nodes[first.id] = replace(nodes[first.id], args=(Operand(0), rows))
    return replace(graph, values=tuple(values), nodes=tuple(nodes))
