"""Rules of losses that compare element by element; those over classes are in `class_losses`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ...ir.mesh import Partial
from ..emit import elementwise
from ..labels import Labelled, aligned, along_labels
from ..lowering import Lowering, Ref
from ..rule import Rule, Table
from ..strategy import OpStrategy, OpView

__all__ = ["LOSSES", "MEAN", "NONE", "SUM"]

NONE, MEAN, SUM = 0, 1, 2
"""Values of the argument `reduction`."""

_TENSORS = ("self", "target", "weight", "pos_weight")


def _elements(view: OpView, parts: int) -> Iterator[OpStrategy]:
    """Over every dim; mean and sum of parts are terms of the whole."""
    positions = [view.operand(name) for name in _TENSORS]
    rank = max(len(type.shape) for type in view.inputs)
    labels = [f"d{dim}" for dim in range(rank)]
    operands: list[Labelled] = [
        (position, aligned(view.input(position), labels))
        for position in positions
        if position is not None
    ]
    result = labels if view.argument("reduction") == NONE else []
    return along_labels(view, parts, operands, [result])


def _lower(lowering: Lowering) -> Sequence[Ref]:
    """The mean of a part, times its share of the elements."""
    results = lowering.same()
    if lowering.view.argument("reduction") != MEAN:
        return results
    if not lowering.axes_with(Partial, lowering.output_layouts[0]):
        return results
    counts = [
        max(type.numel for type in types)
        for types in (map(lowering.type, lowering.inputs), lowering.view.inputs)
    ]
    return (elementwise(lowering, "mul.Tensor", results[0], counts[0] / counts[1]),)


LOSSES: Table = {
    packet: Rule(_elements, _lower)
    for packet in (
        "mse_loss",
        "l1_loss",
        "smooth_l1_loss",
        "huber_loss",
        "binary_cross_entropy",
        "binary_cross_entropy_with_logits",
        "kl_div",
    )
}
