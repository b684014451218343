"""Rules of operators that cut, join, fill up or turn round some dims and leave the others.

The others can be sharded. All are linear: terms of a sum pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from ...ir.mesh import Placement, Shard
from ..rule import Rule, Table
from ..strategy import OpStrategy, OpView
from .common import dim_of, dims_of, for_all, linear, moved, over, strategy

__all__ = ["PIECES"]


def _free(view: OpView, parts: int, dims: Mapping[int, int]) -> Iterator[OpStrategy]:
    """One operand, whose dim i becomes dim `dims[i]` of every result."""
    yield from linear(view, [0])
    yield from moved(view, parts, dims)


def _dropped(rank: int, *gone: int) -> dict[int, int]:
    """Where the dims of a tensor are when some are gone."""
    return {old: new for new, old in enumerate(d for d in range(rank) if d not in gone)}


def _slice(view: OpView, parts: int) -> Iterator[OpStrategy]:
    """All but the dim that is cut, unless the slice is all of it."""
    x, dim = view.input(0), dim_of(view)
    assert dim is not None
    whole = view.packet == "slice" and view.argument("step") == 1 and x.shape == view.output().shape
    yield from _free(view, parts, _others(view, [] if whole else [dim]))


def _select(view: OpView, parts: int) -> Iterator[OpStrategy]:
    dim = dim_of(view)
    assert dim is not None
    yield from _free(view, parts, _dropped(len(view.input(0).shape), dim))


def _diagonal(view: OpView, parts: int) -> Iterator[OpStrategy]:
    first, second = dim_of(view, "dim1"), dim_of(view, "dim2")
    assert first is not None and second is not None
    yield from _free(view, parts, _dropped(len(view.input(0).shape), first, second))


def _split(view: OpView, parts: int) -> Iterator[OpStrategy]:
    dim = dim_of(view)
    assert dim is not None
    yield from _free(view, parts, _others(view, [dim]))


def _along(view: OpView, parts: int) -> Iterator[OpStrategy]:
    """Works along the argument `dims` (all, if it names none)."""
    yield from _free(view, parts, _others(view, dims_of(view, "dims")))


def _last_two(view: OpView, parts: int) -> Iterator[OpStrategy]:
    rank = len(view.input(0).shape)
    yield from _free(view, parts, {d: d for d in range(rank - 2)})


def _others(view: OpView, worked: Sequence[int]) -> dict[int, int]:
    return {d: d for d in range(len(view.input(0).shape)) if d not in worked}


def _pad(view: OpView, parts: int) -> Iterator[OpStrategy]:
    """The dims that get nothing; `padding` lists (before, after) from the last dim on."""
    rank, padding = len(view.input(0).shape), view.argument("padding")
    assert isinstance(padding, tuple)
    padded = [rank - 1 - at // 2 for at, amount in enumerate(padding) if amount != 0]
    yield from _free(view, parts, _others(view, padded))


def _cat(view: OpView, parts: int) -> Iterator[OpStrategy]:
    """Joins along one dim, a new one for `stack`; the others are sharded in all operands."""
    new = view.packet == "stack"
    dim, listed, result = view.argument("dim"), view.argument("tensors"), view.output()
    assert isinstance(dim, int) and isinstance(listed, tuple)
    dim %= len(result.shape)
    yield from linear(view, [getattr(item, "index", None) for item in listed])
    for after in over(result, parts, without=[dim]):
        before = after - (new and after > dim)
        reads = [
            (position, Shard(before))
            for position, type in enumerate(view.inputs)
            if type.shape != (0,)  # which is joined to tensors of any shape
        ]
        yield from strategy(view, reads, Shard(after))


def _scattered_piece(view: OpView, parts: int) -> Iterator[OpStrategy]:
    """`select_scatter`, `slice_scatter`: the second operand replaces a piece of the first."""
    x, source, dim = view.input(0), view.operand("src"), dim_of(view)
    assert source is not None and dim is not None
    yield from linear(view, [0, source])
    gone = view.packet == "select_scatter"
    for old in over(x, parts, without=[dim]):
        piece: Placement = Shard(old - (gone and old > dim))
        yield from strategy(view, [(0, Shard(old)), (source, piece)], Shard(old))


def _diff(view: OpView, parts: int) -> Iterator[OpStrategy]:
    """Differences along one dim; what is put before and after lies alike."""
    dim = dim_of(view)
    operands = [
        item for item in map(view.operand, ("self", "prepend", "append")) if item is not None
    ]
    yield from linear(view, operands)
    for free in over(view.output(), parts, without=[] if dim is None else [dim]):
        yield from strategy(view, [(item, Shard(free)) for item in operands], Shard(free))


PIECES: Table = {
    **for_all("slice narrow", Rule(_slice)),
    **for_all("select", Rule(_select)),
    "unbind": Rule(_select),
    "diagonal": Rule(_diagonal),
    **for_all(
        "split split_with_sizes chunk unsafe_split unsafe_split_with_sizes unsafe_chunk",
        Rule(_split),
    ),
    **for_all("flip roll", Rule(_along)),
    **for_all("tril triu", Rule(_last_two)),
    **for_all(
        "reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d "
        "replication_pad3d",
        Rule(_pad),
    ),
    **for_all("cat concat concatenate stack", Rule(_cat)),
    **for_all("select_scatter slice_scatter", Rule(_scattered_piece)),
    "diff": Rule(_diff),
}
