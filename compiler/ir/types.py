"""Element types and tensor types, the leaves of every level of the IR."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

__all__ = ["DTYPE_NAMES", "DTYPES_BY_NAME", "TensorType", "dtype_name"]

DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "b1",
    torch.complex64: "c64",
    torch.complex128: "c128",
}
DTYPES_BY_NAME: dict[str, torch.dtype] = {name: dtype for dtype, name in DTYPE_NAMES.items()}


def dtype_name(dtype: torch.dtype) -> str:
    """Short name of `dtype` (`f32`, `bf16`, `i64`, ...). Raises KeyError for an unsupported one."""
    return DTYPE_NAMES[dtype]


@dataclass(frozen=True, slots=True)
class TensorType:
    """Static shape and element type of a dense tensor. Prints as `f32[2,16,64]`."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @property
    def is_float(self) -> bool:
        """Whether a tensor of this type can carry a gradient."""
        return self.dtype.is_floating_point or self.dtype.is_complex

    @staticmethod
    def of(tensor: torch.Tensor) -> TensorType:
        return TensorType(tuple(int(size) for size in tensor.shape), tensor.dtype)

    @staticmethod
    def parse(text: str) -> TensorType:
        """Inverse of `str`. Raises ValueError on malformed text."""
        name, bracket, sizes = text.partition("[")
        if not bracket or not sizes.endswith("]") or name not in DTYPES_BY_NAME:
            raise ValueError(f"not a tensor type: {text!r}")
        body = sizes[:-1]
        shape = tuple(int(size) for size in body.split(",")) if body else ()
        return TensorType(shape, DTYPES_BY_NAME[name])

    def __str__(self) -> str:
        return f"{dtype_name(self.dtype)}[{','.join(map(str, self.shape))}]"
