"""Rules of matrix products."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ...ir.graph import Operand
from ..labels import Labels, added_once, aligned, along_labels, call_with
from ..lowering import Lowering, Ref
from ..rule import Rule, Table
from ..strategy import OpStrategy, OpView, StrategyRule

__all__ = ["PRODUCTS"]

_EQUATIONS = {
    "mm": "self:mk mat2:kn -> mn",
    "bmm": "self:bmk mat2:bkn -> bmn",
    "mv": "self:mk vec:k -> m",
    "dot": "self:k tensor:k -> ",
    "outer": "self:m vec2:n -> mn",
}
"""Products of two operands: argument and its dims, then dims of the result."""

_SUMS = {"addmm": "mat1:mk mat2:kn -> mn", "baddbmm": "batch1:bmk batch2:bkn -> bmn"}
"""Products to which `self` is added, broadcast."""


def _product(equation: str, *, added: str = "") -> StrategyRule:
    left, _, result = equation.partition("->")
    terms = [term.split(":") for term in left.split()]

    def strategies(view: OpView, parts: int) -> Iterator[OpStrategy]:
        factors = [(view.operand(name), labels) for name, labels in terms]
        extra = view.operand(added) if added else None
        operands: list[tuple[int | None, Labels]] = list(factors)
        if extra is not None:
            operands.append((extra, aligned(view.input(extra), result.strip())))
        linear = [position for position, _ in factors]
        return along_labels(view, parts, operands, [result.strip()], added=extra, linear=linear)

    return strategies


def _lower_sum(lowering: Lowering) -> Sequence[Ref]:
    name = "bias" if lowering.view.packet == "linear" else "self"
    return call_with(lowering, added_once(lowering, name))


def _linear(view: OpView, parts: int) -> Iterator[OpStrategy]:
    """`x[..., i] w[o, i]' + b[o]`: over leading dims, columns (o) or rows (i) of the weight."""
    x, bias = view.operand("input"), view.operand("bias")
    assert x is not None
    lead = [f"lead{dim}" for dim in range(len(view.input(x).shape) - 1)]
    weight = view.operand("weight")
    assert weight is not None
    columns = ["o"] if len(view.input(weight).shape) == 2 else []
    operands = [(x, [*lead, "i"]), (weight, [*columns, "i"]), (bias, columns)]
    return along_labels(view, parts, operands, [[*lead, *columns]], added=bias, linear=[x])


def _matmul(view: OpView, parts: int) -> Iterator[OpStrategy]:
    """`a[..., m, k] b[..., k, n]` as numpy broadcasts it; operands of one dim have only k."""
    left, right = view.operand("self"), view.operand("other")
    assert left is not None and right is not None
    ranks = len(view.input(left).shape), len(view.input(right).shape)
    batch = [f"batch{dim}" for dim in range(max(*ranks, 2) - 2)]
    rows, columns = ["m"] if ranks[0] > 1 else [], ["n"] if ranks[1] > 1 else []
    operands = [
        (left, [*_last(batch, ranks[0] - 2), *rows, "k"]),
        (right, [*_last(batch, ranks[1] - 2), "k", *columns]),
    ]
    return along_labels(view, parts, operands, [[*batch, *rows, *columns]], linear=[left, right])


def _last(items: Sequence[str], count: int) -> Sequence[str]:
    return items[len(items) - max(count, 0) :]


def _einsum(view: OpView, parts: int) -> Iterator[OpStrategy]:
    """The operator that the labels are named after. Not where dims are unnamed (`...`)."""
    equation, tensors = view.argument("equation"), view.argument("tensors")
    assert isinstance(equation, str) and isinstance(tensors, tuple)
    equation = equation.replace(" ", "")
    if "." in equation:
        return iter(())
    left, arrow, result = equation.partition("->")
    if not arrow:
        result = "".join(
            sorted(item for item in set(left) if item != "," and left.count(item) == 1)
        )
    positions = [item.index for item in tensors if isinstance(item, Operand)]
    operands = list(zip(positions, left.split(","), strict=True))
    return along_labels(view, parts, operands, [result], linear=positions)


PRODUCTS: Table = {
    **{packet: Rule(_product(equation)) for packet, equation in _EQUATIONS.items()},
    **{
        packet: Rule(_product(equation, added="self"), _lower_sum)
        for packet, equation in _SUMS.items()
    },
    "einsum": Rule(_einsum),
    "linear": Rule(_linear, _lower_sum),
    "matmul": Rule(_matmul),
}
