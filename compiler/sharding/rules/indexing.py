"""Rules of operators that read or write where index tensors say.

Rows of indices can be sharded where the tensor that they point into is whole, and dims of that
tensor that they do not point into. Along a dim that is the same for both (a batch), each row of
indices points into its own row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from ...ir.graph import Operand, producers
from ...ir.mesh import Placement, Shard
from ..labels import call_with
from ..lowering import Lowering, Ref
from ..rule import Rule, Table
from ..strategy import OpStrategy, OpView, can_shard
from .common import dim_of, for_all, is_int, linear, moved, over, strategy

__all__ = ["INDEXING"]

Reads = list[tuple[int, Placement]]


def _index_select(view: OpView, parts: int) -> Iterator[OpStrategy]:
    """Whole slices of dim `dim`, in the order of `index`."""
    x, index, dim = view.input(0), view.operand("index"), dim_of(view)
    assert index is not None and dim is not None
    if not x.shape or not view.input(index).shape:
        return
    yield from linear(view, [0])
    yield from moved(view, parts, {d: d for d in range(len(x.shape)) if d != dim})
    if can_shard(view.input(index), 0, parts):
        yield from strategy(view, [(index, Shard(0))], Shard(dim))


def _gather(view: OpView, parts: int) -> Iterator[OpStrategy]:
    """One element of line `dim` for each index; lines are those at the same place of other dims."""
    x, dim = view.input(0), dim_of(view)
    index = view.operand("index" if view.packet == "gather" else "indices")
    if index is None or dim is None or not x.shape:
        return
    rows = view.input(index)
    yield from linear(view, [0])
    for free in over(rows, parts):
        if free == dim:
            yield from strategy(view, [(index, Shard(free))], Shard(free))
        elif x.shape[free] == rows.shape[free]:
            yield from strategy(view, [(0, Shard(free)), (index, Shard(free))], Shard(free))


def _scatter(view: OpView, parts: int) -> Iterator[OpStrategy]:
    """`scatter`, `scatter_add`, `scatter_reduce`: lines of `dim` are written on their own."""
    x, index, dim = view.input(0), view.operand("index"), dim_of(view)
    source = view.operand("src")
    if index is None or dim is None:
        return
    written = [index] if source is None else [index, source]
    for free in over(x, parts, without=[dim]):
        if all(view.input(item).shape[free] == x.shape[free] for item in written):
            yield from strategy(view, [(i, Shard(free)) for i in (0, *written)], Shard(free))
    if view.packet == "scatter_add":
        yield from linear(view, [0, source])


def _along_one_dim(view: OpView, parts: int) -> Iterator[OpStrategy]:
    """`index_copy`, `index_add`, `index_fill`: slices of dim `dim` are written as wholes."""
    x, dim, source = view.input(0), dim_of(view), view.operand("source")
    if dim is None or not x.shape:
        return
    for free in over(x, parts, without=[dim]):
        reads: Reads = [(0, Shard(free))]
        if source is not None:
            reads.append((source, Shard(free)))
        yield from strategy(view, reads, Shard(free))
    if source is not None:
        yield from linear(view, [0, source])


def _one_hot(view: OpView, parts: int) -> Iterator[OpStrategy]:
    """A new last dim; how long it is must not follow from the values."""
    if view.argument("num_classes") != -1:
        yield from moved(view, parts, {d: d for d in range(len(view.input(0).shape))})


# -- a[i, j, ..] -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Indexed:
    """How the dims of `a[indices]` come from those of `a` and of the indices.

    Args:
        tensors: position of the operand that points into a dim of `a`, for those that are.
        shape: of the indices, broadcast together.
        start: the first dim of the result that comes from the indices.
        kept: dim of the result for each dim of `a` that no index points into.
    """

    tensors: Mapping[int, int]
    shape: tuple[int, ...]
    start: int
    kept: Mapping[int, int]

    def reads(self, view: OpView, dim: int) -> Reads:
        """The indices, sharded along dim `dim` of their common shape."""
        found: Reads = []
        for position in self.tensors.values():
            own = dim - len(self.shape) + len(view.input(position).shape)
            if own >= 0 and view.input(position).shape[own] == self.shape[dim]:
                found.append((position, Shard(own)))
        return found


def _indexed(view: OpView) -> _Indexed | None:
    """None: where results come from depends on values (a mask), or `a` is an index of itself."""
    indices = view.argument("indices")
    assert isinstance(indices, tuple)
    tensors = {dim: item.index for dim, item in enumerate(indices) if isinstance(item, Operand)}
    types = [view.input(position) for position in tensors.values()]
    if not tensors or 0 in tensors.values():
        return None
    if any(type.dtype in (torch.bool, torch.uint8) for type in types):
        return None
    shape = tuple(torch.broadcast_shapes(*(type.shape for type in types)))
    dims, rank = sorted(tensors), len(view.input(0).shape)
    adjacent = dims == list(range(dims[0], dims[-1] + 1))
    start = dims[0] if adjacent else 0
    others = [dim for dim in range(rank) if dim not in tensors]
    kept = {old: new + (len(shape) if new >= start else 0) for new, old in enumerate(others)}
    return _Indexed(tensors, shape, start, kept)


def _index(view: OpView, parts: int) -> Iterator[OpStrategy]:
    found = _indexed(view)
    if found is None:
        return
    yield from linear(view, [0])
    yield from moved(view, parts, found.kept)
    for dim in over(view.output(), parts):
        if found.start <= dim < found.start + len(found.shape):
            reads = found.reads(view, dim - found.start)
            yield from strategy(view, reads, Shard(dim))
            for own in _rows_of_their_own(view, found, dim - found.start):
                yield from strategy(view, [(0, Shard(own)), *reads], Shard(dim))


def _index_put(view: OpView, parts: int) -> Iterator[OpStrategy]:
    """`values` are as long as `a[indices]`, or broadcast."""
    found, values = _indexed(view), view.operand("values")
    if found is None or values is None or values in found.tensors.values():
        return
    yield from linear(view, [0, values])
    sizes = {new: view.input(0).shape[old] for old, new in found.kept.items()}
    sizes.update({found.start + i: size for i, size in enumerate(found.shape)})

    def put(dim: int) -> Reads:
        type = view.input(values)
        own = dim - len(sizes) + len(type.shape)
        return [(values, Shard(own))] if own >= 0 and type.shape[own] == sizes[dim] > 1 else []

    for old in over(view.input(0), parts):
        if old in found.kept:
            yield from strategy(view, [(0, Shard(old)), *put(found.kept[old])], Shard(old))
    for dim, size in enumerate(found.shape):
        for own in _rows_of_their_own(view, found, dim) if size >= parts else ():
            reads: Reads = [(0, Shard(own)), *found.reads(view, dim), *put(found.start + dim)]
            if can_shard(view.input(0), own, parts):
                yield from strategy(view, reads, Shard(own))


def _rows_of_their_own(view: OpView, found: _Indexed, dim: int) -> Iterator[int]:
    """The dims of `a` such that row i of the indices, along `dim`, points into row i of `a`."""
    for own, position in found.tensors.items():
        size = view.input(0).shape[own]
        before = len(found.shape) - len(view.input(position).shape)
        if size == found.shape[dim] and _counts_along(view, position) == dim - before:
            yield own


_KEEP_ORDER = frozenset("view reshape _unsafe_view unsqueeze squeeze alias clone _to_copy".split())


def _counts_along(view: OpView, position: int) -> int | None:
    """The dim along which an operand is 0, 1, 2, .. up to its number of elements.

    So it is if it comes from `arange(n)` by operators that keep the order of elements.
    """
    graph, type = view.graph, view.input(position)
    made_by, value = producers(graph), view.node.inputs[position]
    while value in made_by:
        node = graph.nodes[made_by[value]]
        adds_nothing = node.op.packet == "add" and node.args[1:] == (0,)
        if node.op.packet in _KEEP_ORDER or adds_nothing:
            value = node.inputs[0]
            continue
        bounds = node.args if len(node.args) > 1 else (0, *node.args)
        counts = node.op.packet == "arange" and bounds in ((0, type.numel), (0, type.numel, 1))
        long = [dim for dim, size in enumerate(type.shape) if size == type.numel]
        return long[0] if counts and long and all(map(is_int, bounds)) else None
    return None


def _lower_index(lowering: Lowering) -> Sequence[Ref]:
    """Where a rank has some rows of a dim that indices point into, they count from its first."""
    indices = lowering.view.argument("indices")
    assert isinstance(indices, tuple)
    layout = lowering.input_layouts[0]
    local = [lowering.filled(item) for item in indices]
    for dim, ref in enumerate(local):
        if ref is not None and lowering.axes_sharding(layout, dim):
            args = (ref, lowering.input_start(0, dim))
            local[dim] = lowering.emit("aten.sub.Tensor", args, lowering.type(ref))
    return call_with(lowering, {"indices": tuple(local)})


INDEXING: Table = {
    "index_select": Rule(_index_select),
    **for_all("gather take_along_dim", Rule(_gather)),
    **for_all("scatter scatter_add scatter_reduce", Rule(_scatter)),
    **for_all("index_copy index_add index_fill", Rule(_along_one_dim)),
    "one_hot": Rule(_one_hot),
    "index": Rule(_index, _lower_index),
    "index_put": Rule(_index_put, _lower_index),
}
