"""The batch convention: which inputs are split into microbatches, and how.

The batch size is dim 0 of the first tensor input that has one (positional arguments first). Every
tensor whose dim 0 has that size is split along it; everything else goes whole to every microbatch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .ir.errors import UsageError

__all__ = [
    "Call",
    "batch_size",
    "contiguous",
    "microbatches_of",
    "signature_of",
    "take_rows",
]

Call = tuple[tuple[Any, ...], dict[str, Any]]


def batch_size(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """Rows of a call.

    Raises:
        UsageError: no input is a tensor with at least one dim, or it has no rows.
    """
    for leaf in pytree.tree_leaves((args, dict(kwargs))):
        if isinstance(leaf, Tensor) and leaf.ndim >= 1:
            if not leaf.shape[0]:
                raise UsageError(
                    f"the batch has no rows: its first tensor is {tuple(leaf.shape)}",
                    ways_out=("pass a batch of at least one row",),
                )
            return int(leaf.shape[0])
    raise UsageError(
        "no example input is a tensor with a batch dim, so the batch size is unknown",
        ways_out=("pass example_inputs with at least one tensor whose dim 0 is the batch",),
    )


def take_rows(call: Call, rows: int, begin: int = 0) -> Call:
    """The call with `rows` rows of every batched tensor, from row `begin`."""
    args, kwargs = call
    total = batch_size(args, kwargs)

    def cut(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.ndim >= 1 and leaf.shape[0] == total:
            return leaf if rows == total else leaf.narrow(0, begin, rows)
        return leaf

    cut_args, cut_kwargs = pytree.tree_map(cut, (tuple(args), dict(kwargs)))
    return cut_args, cut_kwargs


def contiguous(call: Call) -> Call:
    """The call with tensors in row-major order, as graphs are captured and messages arrive."""
    args, kwargs = pytree.tree_map_only(Tensor, Tensor.contiguous, call)
    return tuple(args), dict(kwargs)


def microbatches_of(call: Call, rows: int) -> Iterator[Call]:
    """Consecutive microbatches of `rows` rows; the batch must be a multiple."""
    total = batch_size(*call)
    assert total % rows == 0
    for begin in range(0, total, rows):
        yield take_rows(call, rows, begin)


def signature_of(call: Call) -> str:
    """Text that two calls share when one captured graph serves both."""
    leaves, structure = pytree.tree_flatten(call)

    def describe(leaf: Any) -> str:
        if isinstance(leaf, Tensor):
            return f"{leaf.dtype}{list(leaf.shape)}"
        if isinstance(leaf, (int, float, bool, str, type(None), torch.dtype, torch.device)):
            return repr(leaf)
        raise UsageError(
            f"an input is a {type(leaf).__name__}, which is neither a tensor nor plain data",
            ways_out=("pass tensors, numbers, strings and containers of them",),
        )

    return f"{structure} {'; '.join(map(describe, leaves))}"
