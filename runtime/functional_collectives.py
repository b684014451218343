"""Collectives by torch's functional ones, for kernels that Inductor compiles.

Plain functions of tensors that Dynamo traces through: packing and unpacking become part of the
compiled kernel. Parts are padded to the largest, as these collectives take equal parts only
(`all_to_all_single` apart).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn.functional import pad

__all__ = ["call", "finish", "start", "takes"]

functional = torch.ops._c10d_functional
_DTYPES = frozenset([torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64])


def takes(node: fx.Node) -> bool:
    """Whether the collective of `node` has a functional form."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dtype in _DTYPES


def call(node: fx.Node, group: str) -> Callable[..., Tensor]:
    """What to call in place of the node's operator, with the same arguments."""
    begin, end = start(node, group), finish(node)

    def collective(x: Tensor, *rest: Any) -> Tensor:
        return end(begin(x, *rest), x, *rest)

    return collective


def start(node: fx.Node, group: str) -> Callable[..., Tensor]:
    """What starts the collective, with the operator's arguments; `finish` takes what it returns."""
    assert isinstance(node.target, torch._ops.OpOverload)
    begin, _ = _FUNCTIONS[node.target.overloadpacket.__name__]

    def started(x: Tensor, *rest: Any) -> Tensor:
        return begin(group, x, *rest)

    return started


def finish(node: fx.Node) -> Callable[..., Tensor]:
    """What waits for a collective and makes its result, from what `start` returned and the
    operator's arguments, of whose tensor it looks at the shape only."""
    assert isinstance(node.target, torch._ops.OpOverload)
    _, end = _FUNCTIONS[node.target.overloadpacket.__name__]

    def finished(begun: Tensor, x: Tensor, *rest: Any) -> Tensor:
        return end(functional.wait_tensor(begun), x.shape, *rest)

    return finished


def _start_all_reduce(group: str, x: Tensor, axis: str, reduction: str) -> Tensor:
    return functional.all_reduce(x.contiguous(), reduction, group)  # type: ignore[no-any-return]


def _reduced(result: Tensor, shape: torch.Size, axis: str, reduction: str) -> Tensor:
    return result


def _start_all_gather(
    group: str, x: Tensor, axis: str, dim: int, sizes: Sequence[int], index: int, partial: bool
) -> Tensor:
    sent = _padded(x, dim, max(sizes)).contiguous()
    return functional.all_gather_into_tensor(sent, len(sizes), group)  # type: ignore[no-any-return]


def _gathered(
    whole: Tensor,
    shape: torch.Size,
    axis: str,
    dim: int,
    sizes: Sequence[int],
    index: int,
    partial: bool,
) -> Tensor:
    if dim == 0 and len(set(sizes)) == 1:
        return whole  # parts have arrived in their places
    sent = [*shape[:dim], max(sizes), *shape[dim + 1 :]]
    rows = whole.view(len(sizes), *sent)
    return torch.cat([row.narrow(dim, 0, size) for row, size in zip(rows, sizes, strict=True)], dim)


def _start_reduce_scatter(
    group: str, x: Tensor, axis: str, dim: int, sizes: Sequence[int], index: int
) -> Tensor:
    if dim == 0 and len(set(sizes)) == 1:
        sent = x.contiguous()
    else:
        parts = [_padded(part, dim, max(sizes)) for part in x.split(list(sizes), dim)]
        sent = torch.cat(parts)  # along dim 0, whichever dim is split
    return functional.reduce_scatter_tensor(  # type: ignore[no-any-return]
        sent, "sum", len(sizes), group
    )


def _scattered(
    own: Tensor, shape: torch.Size, axis: str, dim: int, sizes: Sequence[int], index: int
) -> Tensor:
    return own.narrow(dim, 0, sizes[index]).contiguous()


def _exchanged_shapes(
    shape: Sequence[int],
    from_dim: int,
    from_sizes: Sequence[int],
    to_dim: int,
    to_sizes: Sequence[int],
    index: int,
) -> list[list[int]]:
    """Of what comes from each rank."""
    own = list(shape)
    own[to_dim] = to_sizes[index]
    return [[*own[:from_dim], size, *own[from_dim + 1 :]] for size in from_sizes]


def _start_all_to_all(
    group: str,
    x: Tensor,
    axis: str,
    from_dim: int,
    from_sizes: Sequence[int],
    to_dim: int,
    to_sizes: Sequence[int],
    index: int,
) -> Tensor:
    parts = x.split(list(to_sizes), to_dim)
    shapes = _exchanged_shapes(x.shape, from_dim, from_sizes, to_dim, to_sizes, index)
    counts = [torch.Size(shape).numel() for shape in shapes]
    sent = torch.cat([part.reshape(-1) for part in parts])
    return functional.all_to_all_single(  # type: ignore[no-any-return]
        sent, counts, [part.numel() for part in parts], group
    )


def _exchanged(
    received: Tensor,
    shape: torch.Size,
    axis: str,
    from_dim: int,
    from_sizes: Sequence[int],
    to_dim: int,
    to_sizes: Sequence[int],
    index: int,
) -> Tensor:
    shapes = _exchanged_shapes(shape, from_dim, from_sizes, to_dim, to_sizes, index)
    counts = [torch.Size(item).numel() for item in shapes]
    begins = itertools.accumulate(counts, initial=0)
    rows = [received.narrow(0, begin, count) for begin, count in zip(begins, counts, strict=False)]
    return torch.cat([row.view(item) for row, item in zip(rows, shapes, strict=True)], from_dim)


# what starts each collective, and what makes the result of what has come
_FUNCTIONS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "all_reduce": (_start_all_reduce, _reduced),
    "all_gather": (_start_all_gather, _gathered),
    "reduce_scatter": (_start_reduce_scatter, _scattered),
    "all_to_all": (_start_all_to_all, _exchanged),
}


def _padded(x: Tensor, dim: int, size: int) -> Tensor:
    missing = size - x.shape[dim]
    return pad(x, [0, 0] * (x.ndim - 1 - dim) + [0, missing]) if missing else x
