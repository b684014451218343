"""Small operators that lowerings are written with, each typed as torch types it.

Half precision is computed in float32, as torch's own kernels do inside.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..ir.types import TensorType
from .lowering import Lowering, Ref

__all__ = ["cast", "detached", "elementwise", "narrowed", "reduced", "viewed", "widened"]

_HALF = (torch.float16, torch.bfloat16)


def elementwise(
    lowering: Lowering,
    op: str,
    *args: Ref | float | bool,
    dtype: torch.dtype | None = None,
    **kwargs: object,
) -> Ref:
    """`aten.<op>` of tensors of one dtype, which is broadcast; `dtype` is that of the result where
    it is another one."""
    types = [lowering.type(item) for item in args if isinstance(item, Ref)]
    shape = torch.broadcast_shapes(*(type.shape for type in types))
    result = TensorType(tuple(shape), dtype or types[0].dtype)
    return lowering.emit(f"aten.{op}", args, result, kwargs=tuple(kwargs.items()))


def reduced(
    lowering: Lowering, op: str, ref: Ref, dims: Sequence[int], *, keepdim: bool = False
) -> Ref:
    """`aten.<op>(ref, dims, keepdim)`."""
    type = lowering.type(ref)
    shape = tuple(
        1 if dim in dims else size
        for dim, size in enumerate(type.shape)
        if keepdim or dim not in dims
    )
    integral = op.startswith("sum") and not type.is_float
    dtype = torch.int64 if integral else type.dtype
    return lowering.emit(f"aten.{op}", (ref, tuple(dims), keepdim), TensorType(shape, dtype))


def detached(lowering: Lowering, ref: Ref) -> Ref:
    """The value without its gradient."""
    return lowering.emit("aten.detach.default", (ref,), lowering.type(ref), requires_grad=False)


def viewed(lowering: Lowering, ref: Ref, shape: Sequence[int]) -> Ref:
    type = TensorType(tuple(shape), lowering.type(ref).dtype)
    return lowering.emit("aten.view.default", (ref, type.shape), type)


def cast(lowering: Lowering, ref: Ref, dtype: torch.dtype) -> Ref:
    type = lowering.type(ref)
    if type.dtype == dtype:
        return ref
    result = TensorType(type.shape, dtype)
    return lowering.emit("aten._to_copy.default", (ref,), result, kwargs=(("dtype", dtype),))


def widened(lowering: Lowering, ref: Ref) -> Ref:
    """In the dtype in which sums over its elements are made."""
    dtype = lowering.type(ref).dtype
    return cast(lowering, ref, torch.float32 if dtype in _HALF else dtype)


def narrowed(lowering: Lowering, ref: Ref, position: int = 0) -> Ref:
    """In the dtype of result `position` of the node."""
    return cast(lowering, ref, lowering.output_type(position).dtype)
