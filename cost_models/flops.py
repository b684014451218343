"""Floating-point operations of an op's forward, from the shapes of its operands.

One multiply-add counts as two. Rules are by packet for ops that multiply matrices, by category
for the rest (a few operations per element). For a node of the first kind, the gradient of each
operand costs as much as the forward: y = a b gives da = dy b^T and db = a^T dy, each a product
with the same three dims; likewise convolution and each of attention's two products.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from ..compiler.ir.graph import Graph, Node, Operand
from ..compiler.ir.ops import Category

__all__ = ["forward_flops", "is_product", "is_transposed", "keyword", "positional"]

Shape = tuple[int, ...]

_PER_ELEMENT: dict[Category, float] = {
    Category.NORM: 8.0,
    Category.SOFTMAX: 6.0,
    Category.LOSS: 6.0,
    Category.ELEMENTWISE: 2.0,
    Category.REDUCTION: 1.0,
    Category.POOLING: 4.0,
    Category.OTHER: 2.0,
}
_PRODUCTS = (
    Category.MATMUL,
    Category.ATTENTION,
    Category.CONVOLUTION,
    Category.RECURRENT,
)


def is_product(node: Node) -> bool:
    """Whether the node's work is matrix products, so that it runs at the matrix rate."""
    return node.op.category in _PRODUCTS


def forward_flops(graph: Graph, node: Node) -> float:
    """Operations of the forward of `node` at the captured shapes."""
    shapes = [graph.values[index].type.shape for index in node.inputs]
    outputs = [graph.values[index].type.shape for index in node.outputs]
    if is_product(node):
        rule = _RULES.get(node.op.packet, _RULES_BY_CATEGORY[node.op.category])
        return rule(node, shapes, outputs)
    per_element = _PER_ELEMENT.get(node.op.category, 0.0)
    return per_element * max((math.prod(shape) for shape in (*shapes, *outputs)), default=0)


def positional(node: Node, position: int, default: object = None) -> object:
    """The argument of `node` at `position`, or `default` when the call leaves it out."""
    return node.args[position] if position < len(node.args) else default


def keyword(node: Node, name: str, default: object = None) -> object:
    """The keyword argument `name` of `node`, or `default`."""
    return dict(node.kwargs).get(name, default)


def _linear(node: Node, shapes: list[Shape], outputs: list[Shape]) -> float:
    return 2.0 * math.prod(outputs[0]) * shapes[1][-1]


def _matmul(node: Node, shapes: list[Shape], outputs: list[Shape]) -> float:
    return 2.0 * math.prod(outputs[0]) * shapes[0][-1]


def _addmm(node: Node, shapes: list[Shape], outputs: list[Shape]) -> float:
    left = _operand_shape(node, 1, shapes)
    extra = left[0] if node.op.packet == "addbmm" else 1
    return 2.0 * math.prod(outputs[0]) * left[-1] * extra


def _dot(node: Node, shapes: list[Shape], outputs: list[Shape]) -> float:
    return 2.0 * math.prod(shapes[0])


def _outer(node: Node, shapes: list[Shape], outputs: list[Shape]) -> float:
    return float(math.prod(outputs[0]))


def _bilinear(node: Node, shapes: list[Shape], outputs: list[Shape]) -> float:
    return 2.0 * math.prod(outputs[0]) * shapes[0][-1] * (1 + shapes[1][-1])


def _einsum(node: Node, shapes: list[Shape], outputs: list[Shape]) -> float:
    """Pairwise from left to right, each pair over the union of its letters."""
    equation = node.args[0] if node.args and isinstance(node.args[0], str) else ""
    terms = equation.replace(" ", "").split("->")[0].split(",")
    if "." in equation or len(terms) != len(shapes):
        inner = max((shape[-1] for shape in shapes if shape), default=1)
        return 2.0 * math.prod(outputs[0]) * inner
    sizes = {
        letter: size
        for term, shape in zip(terms, shapes, strict=True)
        for letter, size in zip(term, shape, strict=True)
    }
    target = equation.replace(" ", "").partition("->")[2]
    total, current = 0.0, set(terms[0])
    for position, term in enumerate(terms[1:], 1):
        union = current | set(term)
        total += 2.0 * math.prod(sizes[letter] for letter in union)
        later = set("".join(terms[position + 1 :])) | set(target)
        current = union & later
    return total or 2.0 * math.prod(shapes[0])


def _grouped_mm(node: Node, shapes: list[Shape], outputs: list[Shape]) -> float:
    """Rows are divided among groups, each row meets one matrix: as dense with one group."""
    left, right = shapes[0], shapes[1]
    if len(left) == 2 and len(right) == 2:  # both ragged: the shared dim is divided
        return 2.0 * left[0] * left[1] * right[-1]
    return 2.0 * math.prod(outputs[0]) * left[-1]


def _attention(node: Node, shapes: list[Shape], outputs: list[Shape]) -> float:
    """q k^T and p v. Grouped heads share k and v but each query head computes its own products.

    A causal mask lets fused kernels skip the upper triangle: of `rows x columns` scores, those
    with column <= row remain.
    """
    query, key, value = (_operand_shape(node, position, shapes) for position in range(3))
    rows, columns = query[-2], key[-2]
    scores: float = rows * columns
    causal = positional(node, 5, keyword(node, "is_causal", False))
    if causal is True:
        short = min(rows, columns)
        scores = short * (short + 1) / 2 + max(rows - columns, 0) * columns
    return 2.0 * math.prod(query[:-2]) * scores * (query[-1] + value[-1])


def _convolution(node: Node, shapes: list[Shape], outputs: list[Shape]) -> float:
    """Each output element sums over the weight's `in_channels / groups x kernel`.

    Transposed: each *input* element is multiplied with `out_channels / groups x kernel`.
    """
    image, weight = shapes[0], shapes[1]
    if is_transposed(node):
        return 2.0 * math.prod(image) * math.prod(weight[1:])
    return 2.0 * math.prod(outputs[0]) * math.prod(weight[1:])


def is_transposed(node: Node) -> bool:
    """Whether a convolution node is a transposed one."""
    if node.op.packet.startswith("conv_transpose"):
        return True
    return node.op.packet == "convolution" and positional(node, 6) is True


def _recurrent(node: Node, shapes: list[Shape], outputs: list[Shape]) -> float:
    """Every weight matrix multiplies one vector per step and row: 2 x size x (steps x rows)."""
    steps = math.prod(outputs[0][:-1])
    return 2.0 * steps * sum(math.prod(shape) for shape in shapes[1:] if len(shape) == 2)


def _operand_shape(node: Node, position: int, shapes: list[Shape]) -> Shape:
    argument = node.args[position]
    assert isinstance(argument, Operand), f"{node.name}: argument {position} is not a tensor"
    return shapes[argument.index]


_Rule = Callable[[Node, list[Shape], list[Shape]], float]
_RULES: dict[str, _Rule] = {
    "linear": _linear,
    "addmm": _addmm,
    "baddbmm": _addmm,
    "addbmm": _addmm,
    "addmv": _addmm,
    "dot": _dot,
    "outer": _outer,
    "einsum": _einsum,
    "bilinear": _bilinear,
    "_trilinear": _bilinear,
    "grouped_mm": _grouped_mm,
    "_grouped_mm": _grouped_mm,
}
_RULES_BY_CATEGORY: dict[Category, _Rule] = {
    Category.MATMUL: _matmul,
    Category.ATTENTION: _attention,
    Category.CONVOLUTION: _convolution,
    Category.RECURRENT: _recurrent,
}
