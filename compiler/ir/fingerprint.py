"""Identities of graphs, clusters and plans: SHA-256 of their text forms.

`graph_hash` tells captured models apart, shapes included; user source lines and the device that
the model was captured on do not count. `structure_hash` also forgets what follows from the sizes of
the inputs, so that another batch size or sequence length of the same model keeps it: shapes of
everything but parameters and buffers, and the sizes written into views, copies and factories.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Iterator
from dataclasses import replace

from .errors import CaptureError
from .graph import Attribute, Graph, Node, Operand, Value, ValueKind
from .ops import Category, Op, resolve
from .plan import Fingerprint, Plan
from .text import print_graph, print_plan
from .text.scan import print_literal

__all__ = ["fingerprint", "plan_hash"]

_SIZED = (Category.VIEW, Category.COPY, Category.FACTORY)
_SIZED_PACKETS = frozenset(
    "slice_scatter select_scatter upsample_nearest1d upsample_nearest2d upsample_linear1d "
    "upsample_bilinear2d upsample_bicubic2d".split()
)
# Arguments of such operators that name dims, not sizes.
_DIM_ARGUMENTS = frozenset("dim dims dim0 dim1 dim2 start_dim end_dim source destination".split())
_DEVICE = re.compile(r"device\([^)]*\)")


def fingerprint(graph: Graph, model_name: str) -> Fingerprint:
    """Identity of the model that `graph` was captured from; `model_name` is its class name."""
    parameters = graph.values_of(ValueKind.PARAMETER)
    return Fingerprint(
        name=model_name,
        graph_hash=_sha256(_DEVICE.sub("device()", print_graph(graph, sources=False))),
        structure_hash=_sha256("\n".join(_structure(graph))),
        num_parameters=sum(value.type.numel for value in parameters),
        parameter_bytes=sum(value.type.num_bytes for value in parameters),
    )


def plan_hash(plan: Plan) -> str:
    """Identity of `plan`; how long it was searched, and what was measured on the way, do not
    count."""
    plan = replace(plan, profile=None)
    if plan.certificate is not None:
        plan = replace(plan, certificate=replace(plan.certificate, solver_seconds=0.0))
    return _sha256(print_plan(plan))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _structure(graph: Graph) -> Iterator[str]:
    """Lines that are equal for captures of one model at different input sizes."""
    yield graph.mode.value
    yield from map(_value_structure, graph.values)
    yield from map(_node_structure, graph.nodes)
    yield str(graph.inputs)
    for output in graph.outputs:
        yield f"{output.kind.value} {output.value} {output.target!r} {output.batch_dim}"


def _value_structure(value: Value) -> str:
    fixed = value.kind in (ValueKind.PARAMETER, ValueKind.BUFFER)
    shape = value.type.shape if fixed else len(value.type.shape)
    return (
        f"{value.kind.value} {value.type.dtype} {shape} {value.origin!r} {value.requires_grad} "
        f"{value.batch_dim} {value.aliases!r}"
    )


def _node_structure(node: Node) -> str:
    def operand(item: Operand) -> str:
        return f"%{node.inputs[item.index]}"

    sized = node.op.category in _SIZED or node.op.packet in _SIZED_PACKETS
    names = _positional_names(node.op) if sized else ()
    call = []
    for position, item in enumerate(node.args):
        name = names[position] if position < len(names) else ""
        kept = item if not sized or name in _DIM_ARGUMENTS else _without_sizes(item)
        call.append(print_literal(kept, operand))
    for name, item in node.kwargs:
        kept = item if not sized or name in _DIM_ARGUMENTS else _without_sizes(item)
        call.append(f"{name}={print_literal(kept, operand)}")
    text = f"{node.outputs} = {node.op.name}({', '.join(call)})"
    return f"{_DEVICE.sub('device()', text)} {node.module_path!r} {node.random_draw}"


@functools.cache
def _positional_names(op: Op) -> tuple[str, ...]:
    try:
        return tuple(argument.name for argument in resolve(op)._schema.arguments)
    except CaptureError:
        return ()


def _without_sizes(item: Attribute) -> Attribute:
    """`item` with every number in it replaced; the number of sizes stays."""
    if isinstance(item, tuple):
        return tuple(_without_sizes(part) for part in item)
    if isinstance(item, (int, float)) and not isinstance(item, bool):
        return "size"
    return item
