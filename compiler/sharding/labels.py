"""Strategies of operators whose dims can be named, as in Einstein notation.

`mm` is `mk,kn->mn`: splitting a label of the result splits the result; splitting one that is
summed over makes every rank's result a term of the sum. An operand without the label is replicated,
and so is one that is broadcast along it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..ir.graph import Attribute
from ..ir.mesh import Partial, Placement, Replicate, Shard
from ..ir.ops import resolve
from ..ir.types import TensorType
from .lowering import Lowering, Ref
from .strategy import OpStrategy, OpView, can_shard

__all__ = ["Labelled", "Labels", "added_once", "aligned", "along_labels", "call_with", "integer"]

Labels = Sequence[str]
"""One label a dim. Dims of one label are split together; those labelled `""` never are."""

Labelled = tuple[int | None, Labels]
"""A tensor argument: position in `node.inputs` (None: not given) and labels. A tensor that is given
for two arguments occurs twice."""


def along_labels(
    view: OpView,
    parts: int,
    operands: Sequence[Labelled],
    results: Sequence[Labels],
    *,
    added: int | None = None,
    linear: Sequence[int | None] = (),
) -> Iterator[OpStrategy]:
    """One strategy for each label that can be split, then for each operand that may be Partial.

    A label that no result has is summed over. Dims of one label that differ in size (heads of
    queries and of keys) are split in proportion, so only evenly.

    Args:
        added: an operand that is added to the sum: where the sum is split its first rank adds it.
        linear: operands in which the result is linear when all others are fixed, `added` aside.
    """
    operands = [(position, labels) for position, labels in operands if position is not None]
    for label in dict.fromkeys(
        label
        for labels in (*results, *(labels for _, labels in operands))
        for label in labels
        if label
    ):
        strategy = _along(view, parts, label, operands, results, added)
        if strategy is not None:
            yield strategy
    for position in linear:
        if position is None or [item for item, _ in operands].count(position) != 1:
            continue
        inputs: list[Placement] = [Replicate()] * len(view.inputs)
        inputs[position] = Partial()
        yield OpStrategy(
            tuple(inputs), (Partial(),) * len(results), () if added is None else (added,)
        )


def _along(
    view: OpView,
    parts: int,
    label: str,
    operands: Sequence[tuple[int | None, Labels]],
    results: Sequence[Labels],
    added: int | None,
) -> OpStrategy | None:
    reads = [(view.input(p), labels) for p, labels in operands if p is not None]
    makes = list(zip(view.outputs, results, strict=True))
    sizes = {
        size
        for type, labels in (*reads, *makes)
        for size, mine in zip(type.shape, labels, strict=True)
        if mine == label and size != 1
    }
    found = [_placement(type, labels, label, parts, len(sizes) > 1) for type, labels in reads]
    inputs: list[Placement | None] = [None] * len(view.inputs)
    for (position, _), placement in zip(operands, found, strict=True):
        assert position is not None
        if placement is None or inputs[position] not in (None, placement):
            return None
        inputs[position] = placement
    outputs: list[Placement] = []
    for type, labels in makes:
        made = _placement(type, labels, label, parts, len(sizes) > 1)
        if made is None or (isinstance(made, Replicate) and label in labels):
            return None
        outputs.append(made if isinstance(made, Shard) else Partial())
    if not any(isinstance(item, Shard) for item in inputs):
        return None
    whole = added is not None and inputs[added] == Replicate() and outputs[0] == Partial()
    return OpStrategy(
        tuple(item or Replicate() for item in inputs),
        tuple(outputs),
        (added,) if whole and added is not None else (),
    )


def _placement(
    type: TensorType, labels: Labels, label: str, parts: int, even: bool
) -> Placement | None:
    """Placement of one tensor when `label` is split; None: it cannot be."""
    dims = [dim for dim, mine in enumerate(labels) if mine == label]
    if not dims or (len(dims) == 1 and type.shape[dims[0]] == 1):
        return Replicate()
    if len(dims) > 1 or not can_shard(type, dims[0], parts, even=even):
        return None
    return Shard(dims[0])


def aligned(type: TensorType | None, labels: Labels) -> Labels:
    """Labels of a tensor that is broadcast to dims with `labels`: the last ones."""
    count = 0 if type is None else len(type.shape)
    return labels[len(labels) - count :]


# -- lowering --------------------------------------------------------------------------------------


def call_with(lowering: Lowering, changes: Mapping[str, Any]) -> tuple[Ref, ...]:
    """The node itself on its local operands, with other values for the arguments named."""
    node = lowering.node
    args = [lowering.filled(item) for item in node.args]
    kwargs = {name: lowering.filled(item) for name, item in node.kwargs}
    names = [item.name for item in resolve(node.op)._schema.arguments if not item.kwarg_only]
    for name, value in changes.items():
        if name in names[: len(args)]:
            args[names.index(name)] = value
        else:
            kwargs[name] = value
    return lowering.same(args=args, kwargs=tuple(kwargs.items()))


def added_once(lowering: Lowering, name: str) -> dict[str, Ref]:
    """Operand `name`, which is added to a sum, for `call_with`: only one of the ranks that hold
    terms of the sum adds it. Empty if it is not given."""
    position = lowering.view.operand(name)
    if position is None:
        return {}
    ref = lowering.inputs[position]
    for axis in lowering.axes_with(Partial, lowering.output_layouts[0]):
        ref = lowering.as_partial(ref, axis)
    return {name: ref}


def integer(item: Attribute) -> int:
    """An attribute that the operator's schema types as an integer."""
    assert isinstance(item, int)
    return item
