"""The collective operators: schemas, result shapes and adjoints.

A rank's stage graph computes on its own parts of tensors and meets other ranks in nodes of
namespace `cutset`. They are operators of torch, so that a graph that holds them verifies, runs on
fake tensors and is differentiated like any other; the adjoint of a collective is a collective.
`axis` names a mesh axis, whose ranks take part; `sizes` are the sizes of all parts along `dim`,
`index` is the position of this rank. Parts may differ in size; none is empty.

    operator        value                                  adjoint
    all_reduce      terms -> their sum (max, min)          identity (max, min: no gradient)
    sum_gradient    identity                               all_reduce
    as_partial      itself at index 0, zeros elsewhere     identity on every rank
    shard           whole -> own part                      all_gather
    all_gather      parts -> whole                         shard, or reduce_scatter if each rank's
                                                           gradient is a term (partial_gradient)
    reduce_scatter  terms -> own part of their sum         all_gather
    all_to_all      parts along from_dim -> along to_dim   all_to_all, the way back

They follow from how gradients lie (see `compiler/sharding/strategy.py`) and generalise the pair f
and g of Shoeybi et al., "Megatron-LM" (2019).

torch keeps operators in a registry of the process, so importing this module registers them. They
cannot be executed: only who runs a program knows the ranks of an axis and how to reach them, and
binds them before (`runtime/collective_ops.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["NAMESPACE"]

NAMESPACE = "cutset"


def _resized(x: Tensor, dim: int, size: int) -> Tensor:
    return x.new_empty((*x.shape[:dim], size, *x.shape[dim + 1 :]))


def _check_part(x: Tensor, dim: int, size: int) -> None:
    if x.shape[dim] != size:
        raise ValueError(f"dim {dim} of {tuple(x.shape)} is not {size} long, as its part should be")


def _fake_same(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


def _fake_sum(x: Tensor, axis: str, reduction: str) -> Tensor:
    return x.new_empty(x.shape)


def _fake_part(x: Tensor, axis: str, dim: int, sizes: Sequence[int], index: int) -> Tensor:
    _check_part(x, dim, sum(sizes))
    return _resized(x, dim, sizes[index])


def _fake_whole(
    x: Tensor, axis: str, dim: int, sizes: Sequence[int], index: int, partial_gradient: bool
) -> Tensor:
    _check_part(x, dim, sizes[index])
    return _resized(x, dim, sum(sizes))


def _fake_exchanged(
    x: Tensor,
    axis: str,
    from_dim: int,
    from_sizes: Sequence[int],
    to_dim: int,
    to_sizes: Sequence[int],
    index: int,
) -> Tensor:
    _check_part(x, from_dim, from_sizes[index])
    _check_part(x, to_dim, sum(to_sizes))
    return _resized(_resized(x, from_dim, sum(from_sizes)), to_dim, to_sizes[index])


# Adjoints: the gradient of the result and the other arguments of the call -> the gradient of `x`.


def _same(gradient: Tensor, *_: Any) -> Tensor:
    return gradient


def _sum(gradient: Tensor, axis: str) -> Tensor:
    return torch.ops.cutset.all_reduce(gradient, axis, "sum")  # type: ignore[no-any-return]


def _whole(gradient: Tensor, axis: str, dim: int, sizes: Sequence[int], index: int) -> Tensor:
    gathered = torch.ops.cutset.all_gather(gradient, axis, dim, sizes, index, False)
    return gathered  # type: ignore[no-any-return]


def _part(
    gradient: Tensor,
    axis: str,
    dim: int,
    sizes: Sequence[int],
    index: int,
    partial_gradient: bool,
) -> Tensor:
    operators = torch.ops.cutset
    operator = operators.reduce_scatter if partial_gradient else operators.shard
    return operator(gradient, axis, dim, sizes, index)  # type: ignore[no-any-return]


def _back(
    gradient: Tensor,
    axis: str,
    from_dim: int,
    from_sizes: Sequence[int],
    to_dim: int,
    to_sizes: Sequence[int],
    index: int,
) -> Tensor:
    swapped = (to_dim, to_sizes, from_dim, from_sizes, index)
    return torch.ops.cutset.all_to_all(gradient, axis, *swapped)  # type: ignore[no-any-return]


_PART = "(Tensor x, str axis, int dim, int[] sizes, int index"
_OPERATORS: dict[str, tuple[str, Callable[..., Tensor], Callable[..., Tensor]]] = {
    "all_reduce": ("(Tensor x, str axis, str reduction)", _fake_sum, _same),
    "sum_gradient": ("(Tensor x, str axis)", _fake_same, _sum),
    "as_partial": ("(Tensor x, int index)", _fake_same, _same),
    "shard": (f"{_PART})", _fake_part, _whole),
    "all_gather": (f"{_PART}, bool partial_gradient)", _fake_whole, _part),
    "reduce_scatter": (f"{_PART})", _fake_part, _whole),
    "all_to_all": (
        "(Tensor x, str axis, int from_dim, int[] from_sizes, int to_dim, int[] to_sizes, "
        "int index)",
        _fake_exchanged,
        _back,
    ),
}


def _refuse(name: str) -> Callable[..., Tensor]:
    def refuse(*_: Any) -> Tensor:
        raise RuntimeError(
            f"{NAMESPACE}::{name} was called outside of a stage: collectives run once they are "
            "bound to the communicator of a rank"
        )

    return refuse


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.rest = inputs[1:]
    if inputs[1:] and inputs[-1] in ("max", "min"):
        ctx.mark_non_differentiable(output)


def _backward(adjoint: Callable[..., Tensor]) -> Callable[..., tuple[Tensor | None, ...]]:
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return (adjoint(gradient, *ctx.rest), *([None] * len(ctx.rest)))

    return backward


def _register() -> None:
    """Idempotent, as a module can be imported anew in one process."""
    for name, (arguments, fake, adjoint) in _OPERATORS.items():
        if hasattr(torch.ops.cutset, name):
            continue
        operator = f"{NAMESPACE}::{name}"
        torch.library.define(operator, f"{arguments} -> Tensor")
        torch.library.impl(operator, "CompositeExplicitAutograd", _refuse(name))
        torch.library.register_fake(operator, fake)
        torch.library.register_autograd(operator, _backward(adjoint), setup_context=_remember)


_register()
