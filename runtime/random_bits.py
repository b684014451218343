"""Random bits by hashing counters, and the uniform and normal numbers made of them.

A number is a hash of a key (two words, from seed, step and microbatch), of the draw (ordinal of the
random op in the forward pass), of a lane (several numbers of one element) and of the element's
linear index. Whoever holds a part of a tensor says which in a `window`, the shape of the whole and
where the part begins, and hashes the indices that its elements have in the whole.

The hash is 32-bit integer arithmetic in plain torch ops: the same bits on every device, traceable
by `make_fx`, fused by Inductor, replayed inside CUDA graphs (the key is a tensor). The mixing is
three rounds of the multiply / xor-shift construction of integer finalisers (as in Appleby's
MurmurHash3); counters in place of states follow Salmon et al., "Parallel random numbers: as easy as
1, 2, 3" (SC 2011).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Window", "bits", "chance", "normal", "uniform"]

Window = tuple[Sequence[int], Sequence[int]]
"""(shape of the whole tensor, where the part that is drawn begins in it)."""

_POSITIVE = 0x7FFFFFFF
# Odd factors below 2**31: as Python scalars they fit an int32 tensor op.
_FACTORS = (0x2C1B3C6D, 0x297A2D39, 0x7ED1E2A5)
_SHIFTS = (15, 14, 17)
_MANTISSA_BITS = {torch.float16: 11, torch.bfloat16: 8, torch.float32: 24}


def bits(
    key: Tensor,
    draw: int,
    shape: Sequence[int],
    device: torch.device,
    lane: int = 0,
    window: Window | None = None,
) -> Tensor:
    """int32 tensor of `shape`, every bit of every element fair and independent.

    With `window` they are those of a part of a tensor: the same bits as in the whole.
    """
    first, second = _key_words(key.to(device), draw, lane)
    index = _indices(shape, device, window)
    word = index
    if index.dtype == torch.int64:
        word = (index & _POSITIVE).to(torch.int32)
        first = first + (index >> 31).to(torch.int32) * _FACTORS[2]
    # The key comes first: a compiler that folds arithmetic on indices must not get past it.
    word = _round(word ^ first, 0)
    word = _round(word ^ second, 1)
    return _round(word, 2).view(tuple(shape))


def _indices(shape: Sequence[int], device: torch.device, window: Window | None) -> Tensor:
    """Linear index of each element in the whole tensor; int32 if all of the whole's fit."""
    whole, offset = (shape, None) if window is None else window
    dtype = torch.int32 if math.prod(whole) <= _POSITIVE else torch.int64
    if offset is None:
        return torch.arange(math.prod(shape), dtype=dtype, device=device)
    index = torch.zeros((), dtype=dtype, device=device)
    stride = 1
    for depth, (size, total, begin) in enumerate(
        zip(reversed(shape), reversed(whole), reversed(offset), strict=True)
    ):
        steps = torch.arange(begin, begin + size, dtype=dtype, device=device)
        index = (steps * stride).view(size, *[1] * depth) + index
        stride *= total
    return index


def _round(word: Tensor, number: int) -> Tensor:
    word = word * _FACTORS[number]
    shift = _SHIFTS[number]
    return word ^ ((word >> shift) & ((1 << (32 - shift)) - 1))


def _key_words(key: Tensor, draw: int, lane: int) -> tuple[Tensor, Tensor]:
    """Two 0-dim int32 tensors: the halves of the key, each xor-ed with a hash of (draw, lane)."""
    low, high = (_integer_hash(4 * draw + lane, salt) & _POSITIVE for salt in (1, 2))
    first = ((key & _POSITIVE) ^ low).to(torch.int32)
    second = (((key >> 31) & _POSITIVE) ^ high).to(torch.int32)
    return first, second


def _integer_hash(number: int, salt: int) -> int:
    word = (number * 0x9E3779B97F4A7C15 + salt * 0xD1B54A32D192ED03) & ((1 << 64) - 1)
    word = ((word ^ (word >> 32)) * 0xD6E8FEB86659FD93) & ((1 << 64) - 1)
    return word ^ (word >> 31)


def chance(
    key: Tensor,
    draw: int,
    shape: Sequence[int],
    device: torch.device,
    probability: float,
    window: Window | None = None,
) -> Tensor:
    """bool tensor, true with `probability` (to within 2**-32)."""
    threshold = round(probability * 2**32) - 2**31
    if threshold > _POSITIVE:
        return torch.ones(tuple(shape), dtype=torch.bool, device=device)
    return bits(key, draw, shape, device, window=window) < threshold


def uniform(
    key: Tensor,
    draw: int,
    shape: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
    lane: int = 0,
    window: Window | None = None,
) -> Tensor:
    """Numbers in [0, 1), with as many random bits as `dtype` has in its mantissa."""
    where = key.device if device is None else device
    word = bits(key, draw, shape, where, lane, window)
    if dtype == torch.float64:
        other = bits(key, draw, shape, where, lane + 2, window)
        head = ((word >> 6) & 0x3FFFFFF).to(dtype)
        return (head * 2.0**27 + ((other >> 5) & 0x7FFFFFF).to(dtype)) * 2.0**-53
    kept = _MANTISSA_BITS[dtype]
    return ((word >> (32 - kept)) & ((1 << kept) - 1)).to(dtype) * 2.0**-kept


def normal(
    key: Tensor,
    draw: int,
    shape: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
    window: Window | None = None,
) -> Tensor:
    """Standard normal numbers by the transform of Box and Muller (1958)."""
    wide = dtype if dtype == torch.float64 else torch.float32
    radius = uniform(key, draw, shape, dtype=wide, device=device, lane=0, window=window)
    angle = uniform(key, draw, shape, dtype=wide, device=device, lane=1, window=window)
    value = torch.sqrt(-2.0 * torch.log1p(-radius)) * torch.cos((2.0 * math.pi) * angle)
    return value.to(dtype)
