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

__all__ = ["call", "takes"]

functional = torch.ops._c10d_functional
_DTYPES = frozenset([torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64])


def takes(node: fx.Node) -> bool:
    """Whether the collective of `node` has a functional form."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dtype in _DTYPES


def call(node: fx.Node, group: str) -> Callable[..., Tensor]:
    """What to call in place of the node's operator, with the same arguments."""
    assert isinstance(node.target, torch._ops.OpOverload)
    function = _FUNCTIONS[node.target.overloadpacket.__name__]

    def collective(x: Tensor, *rest: Any) -> Tensor:
        return function(group, x, *rest)

    return collective


def _all_reduce(group: str, x: Tensor, axis: str, reduction: str) -> Tensor:
    return _wait(functional.all_reduce(x.contiguous(), reduction, group))


def _all_gather(
    group: str, x: Tensor, axis: str, dim: int, sizes: Sequence[int], index: int, partial: bool
) -> Tensor:
    sent = _padded(x, dim, max(sizes)).contiguous()
    whole = _wait(functional.all_gather_into_tensor(sent, len(sizes), group))
    rows = whole.view(len(sizes), *sent.shape)
    return torch.cat([row.narrow(dim, 0, size) for row, size in zip(rows, sizes, strict=True)], dim)


def _reduce_scatter(
    group: str, x: Tensor, axis: str, dim: int, sizes: Sequence[int], index: int
) -> Tensor:
    parts = [_padded(part, dim, max(sizes)) for part in x.split(list(sizes), dim)]
    sent = torch.cat(parts)  # along dim 0, whichever dim is split
    own = _wait(functional.reduce_scatter_tensor(sent, "sum", len(sizes), group))
    return own.narrow(dim, 0, sizes[index]).contiguous()


def _all_to_all(
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
    own = list(x.shape)
    own[to_dim] = to_sizes[index]
    shapes = [[*own[:from_dim], size, *own[from_dim + 1 :]] for size in from_sizes]
    counts = [torch.Size(shape).numel() for shape in shapes]
    sent = torch.cat([part.reshape(-1) for part in parts])
    received = _wait(
        functional.all_to_all_single(sent, counts, [part.numel() for part in parts], group)
    )
    begins = itertools.accumulate(counts, initial=0)
    rows = [received.narrow(0, begin, count) for begin, count in zip(begins, counts, strict=False)]
    return torch.cat([row.view(shape) for row, shape in zip(rows, shapes, strict=True)], from_dim)


_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "all_reduce": _all_reduce,
    "all_gather": _all_gather,
    "reduce_scatter": _reduce_scatter,
    "all_to_all": _all_to_all,
}


def _wait(started: Tensor) -> Tensor:
    return functional.wait_tensor(started)  # type: ignore[no-any-return]


def _padded(x: Tensor, dim: int, size: int) -> Tensor:
    missing = size - x.shape[dim]
    return pad(x, [0, 0] * (x.ndim - 1 - dim) + [0, missing]) if missing else x
