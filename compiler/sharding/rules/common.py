"""What rules share: placements by operand, broadcasting, dims counted from the front."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from ...ir.graph import Attribute, operands
from ...ir.mesh import Partial, Placement, Replicate, Shard
from ...ir.ops import resolve
from ...ir.types import TensorType
from ..labels import call_with
from ..lowering import Lowering, Ref
from ..rule import Rule, Table
from ..strategy import OpStrategy, OpView, can_shard

__all__ = [
    "broadcast",
    "dim_of",
    "dims_of",
    "for_all",
    "is_int",
    "is_sharded",
    "linear",
    "lower_to_size",
    "moved",
    "over",
    "strategy",
    "whole_dims",
]


def for_all(packets: str, rule: Rule) -> Table:
    """The table that gives every one of `packets` (separated by blanks) the same rule."""
    return dict.fromkeys(packets.split(), rule)


# -- strategies ------------------------------------------------------------------------------------


def strategy(
    view: OpView,
    reads: Sequence[tuple[int, Placement]],
    output: Placement | Sequence[Placement],
    *,
    full_gradients: tuple[int, ...] = (),
) -> Iterator[OpStrategy]:
    """The strategy with these placements of operands, by position, and `Replicate` for others.

    Nothing if one operand, given twice to the operator, is to have two placements.
    """
    given: dict[int, Placement] = {}
    for position, placement in reads:
        if given.setdefault(position, placement) != placement:
            return
    inputs = tuple(given.get(position, Replicate()) for position in range(len(view.inputs)))
    outputs = tuple(output) if isinstance(output, Sequence) else (output,) * len(view.outputs)
    yield OpStrategy(inputs, outputs, full_gradients)


def over(type: TensorType, parts: int, *, without: Sequence[int] = ()) -> Iterator[int]:
    """The dims of `type` that can be sharded, but for some."""
    for dim in range(len(type.shape)):
        if dim not in without and can_shard(type, dim, parts):
            yield dim


def moved(
    view: OpView, parts: int, dims: Mapping[int, int], operand: int = 0
) -> Iterator[OpStrategy]:
    """Shards dim i of one operand and so dim `dims[i]` of all results."""
    for before in over(view.input(operand), parts):
        if before in dims:
            yield from strategy(view, [(operand, Shard(before))], Shard(dims[before]))


def whole_dims(view: OpView, parts: int, worked: Sequence[int]) -> Iterator[OpStrategy]:
    """Shards any dim of the first operand but those that the operator works along."""
    free = {d: d for d in range(len(view.input(0).shape)) if d not in worked}
    yield from moved(view, parts, free)


def linear(
    view: OpView, terms: Sequence[int | None], outputs: Sequence[Placement] = ()
) -> Iterator[OpStrategy]:
    """Terms of a sum pass an operator that is linear in the operands `terms` taken together.

    All results are terms too, unless `outputs` says otherwise. Nothing if no terms are given, if
    one of them is no tensor or occurs in the call elsewhere too, as in `x * x`, or if terms would
    be rounded to another type.
    """
    node = view.node
    if not terms:
        return
    read = [item.index for item in (*operands(node.args), *operands(tuple(node.kwargs)))]
    for term in terms:
        if term is None or terms.count(term) != read.count(term):
            return
        if not view.input(term).is_float or view.input(term).dtype != view.output().dtype:
            return
    yield from strategy(
        view, [(term, Partial()) for term in terms if term is not None], outputs or Partial()
    )


def broadcast(view: OpView, parts: int) -> Iterator[OpStrategy]:
    """Shards any dim of the results of an operator that works element by element.

    An operand without that dim, or with size 1 there, is whole.
    """
    result = view.output()
    for dim in over(result, parts):
        reads: list[tuple[int, Placement]] = []
        for position, type in enumerate(view.inputs):
            own = dim - len(result.shape) + len(type.shape)
            if own >= 0 and type.shape[own] == result.shape[dim]:
                reads.append((position, Shard(own)))
        yield from strategy(view, reads, Shard(dim))


# -- arguments -------------------------------------------------------------------------------------


def dim_of(view: OpView, name: str = "dim", operand: int = 0) -> int | None:
    """The argument `name`, a dim of an operand, counted from the front."""
    dim = view.argument(name)
    return dim % max(1, len(view.input(operand).shape)) if isinstance(dim, int) else None


def dims_of(view: OpView, name: str = "dim", operand: int = 0) -> tuple[int, ...]:
    """The argument `name`, dims of an operand, counted from the front; none given: all dims."""
    given = view.argument(name)
    rank = len(view.input(operand).shape)
    if given is None or given == ():
        return tuple(range(rank))
    dims = given if isinstance(given, tuple) else (given,)
    return tuple(dim % max(1, rank) for dim in dims if isinstance(dim, int))


def lower_to_size(lowering: Lowering) -> Sequence[Ref]:
    """The operator itself, its argument `size` (or `shape`) being that of the local result."""
    schema = resolve(lowering.node.op)._schema
    name = "shape" if any(item.name == "shape" for item in schema.arguments) else "size"
    return call_with(lowering, {name: lowering.output_type().shape})


def is_sharded(lowering: Lowering, position: int = 0) -> bool:
    """Whether a rank has but a part of result `position`."""
    return bool(lowering.axes_with(Shard, lowering.output_layouts[position]))


def is_int(item: Attribute) -> bool:
    """Whether an argument is a whole number."""
    return isinstance(item, int) and not isinstance(item, bool)
