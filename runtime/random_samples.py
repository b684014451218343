"""Samples drawn from counters: the replacements of ATen's distributions and random factories.

Each takes the key of a microbatch, the ordinal of the draw, then what the operator takes; those
that can draw a part of their result take its `window` (see `random_bits.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .random_bits import Window, bits, chance, normal, uniform


def _wide_uniform(key: Tensor, draw: int, like: Tensor, window: Window | None = None) -> Tensor:
    dtype = _float(like.dtype)
    return uniform(key, draw, like.shape, dtype=dtype, device=like.device, window=window)


def _float(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def draw_bernoulli(
    key: Tensor,
    draw: int,
    /,
    self: Tensor,
    p: float | Tensor | None = None,
    generator: object = None,
    *,
    window: Window | None = None,
) -> Tensor:
    if isinstance(p, (int, float)):
        return chance(key, draw, self.shape, self.device, float(p), window).to(self.dtype)
    probability = self if p is None else p.to(self.device)
    dtype = _float(probability.dtype)
    number = uniform(key, draw, self.shape, dtype=dtype, device=self.device, window=window)
    return (number < probability).to(self.dtype)


def draw_uniform(
    key: Tensor,
    draw: int,
    /,
    self: Tensor,
    low: float = 0.0,
    high: float = 1.0,
    *,
    generator: object = None,
    window: Window | None = None,
    **bounds: float,
) -> Tensor:
    low, high = bounds.get("from", low), bounds.get("to", high)
    return (_wide_uniform(key, draw, self, window) * (high - low) + low).to(self.dtype)


def draw_normal_like(
    key: Tensor,
    draw: int,
    /,
    self: Tensor,
    mean: float = 0.0,
    std: float = 1.0,
    *,
    generator: object = None,
    window: Window | None = None,
) -> Tensor:
    number = normal(key, draw, self.shape, dtype=self.dtype, device=self.device, window=window)
    return number * std + mean


def draw_exponential(
    key: Tensor,
    draw: int,
    /,
    self: Tensor,
    lambd: float = 1.0,
    *,
    generator: object = None,
    window: Window | None = None,
) -> Tensor:
    return (-torch.log1p(-_wide_uniform(key, draw, self, window)) / lambd).to(self.dtype)


def _integers(
    key: Tensor,
    draw: int,
    shape: Sequence[int],
    low: int,
    high: int,
    device: torch.device,
    window: Window | None,
) -> Tensor:
    """int64 numbers in [low, high); ranges up to 2**53 are uniform to within rounding."""
    number = uniform(key, draw, shape, dtype=torch.float64, device=device, window=window)
    return torch.floor(number * (high - low)).to(torch.int64) + low


def draw_random(
    key: Tensor,
    draw: int,
    /,
    self: Tensor,
    low: int = 0,
    high: int | None = None,
    *,
    window: Window | None = None,
    **_: object,
) -> Tensor:
    if high is None:
        low, high = 0, low or 2**24
    return _integers(key, draw, self.shape, low, high, self.device, window).to(self.dtype)


def draw_normal(
    key: Tensor,
    draw: int,
    /,
    mean: float | Tensor,
    std: float | Tensor = 1.0,
    size: Sequence[int] | None = None,
    *,
    generator: object = None,
    window: Window | None = None,
    **options: Any,
) -> Tensor:
    tensor = next((item for item in (mean, std) if isinstance(item, Tensor)), None)
    if tensor is None:
        assert size is not None
        return draw_randn(key, draw, size, window=window, **options) * std + mean
    shape = tensor.shape
    if isinstance(mean, Tensor) and isinstance(std, Tensor):
        shape = torch.broadcast_shapes(mean.shape, std.shape)
    number = normal(key, draw, shape, dtype=tensor.dtype, device=tensor.device, window=window)
    return number * std + mean


def _device(key: Tensor, device: torch.device | None) -> torch.device:
    return key.device if device is None else torch.device(device)


def draw_rand(
    key: Tensor,
    draw: int,
    /,
    size: Sequence[int],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    window: Window | None = None,
    **_: object,
) -> Tensor:
    dtype = dtype or torch.get_default_dtype()
    return uniform(key, draw, size, dtype=dtype, device=_device(key, device), window=window)


def draw_randn(
    key: Tensor,
    draw: int,
    /,
    size: Sequence[int],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    window: Window | None = None,
    **_: object,
) -> Tensor:
    dtype = dtype or torch.get_default_dtype()
    return normal(key, draw, size, dtype=dtype, device=_device(key, device), window=window)


def draw_rand_like(
    key: Tensor,
    draw: int,
    /,
    self: Tensor,
    *,
    dtype: torch.dtype | None = None,
    window: Window | None = None,
    **_: object,
) -> Tensor:
    dtype = dtype or self.dtype
    return uniform(key, draw, self.shape, dtype=dtype, device=self.device, window=window)


def draw_randn_like(
    key: Tensor,
    draw: int,
    /,
    self: Tensor,
    *,
    dtype: torch.dtype | None = None,
    window: Window | None = None,
    **_: object,
) -> Tensor:
    dtype = dtype or self.dtype
    return normal(key, draw, self.shape, dtype=dtype, device=self.device, window=window)


def draw_randint(
    key: Tensor,
    draw: int,
    /,
    *bounds_and_size: Any,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    window: Window | None = None,
    **_: object,
) -> Tensor:
    *bounds, size = bounds_and_size
    low, high = bounds if len(bounds) == 2 else (0, bounds[0])
    number = _integers(key, draw, size, low, high, _device(key, device), window)
    return number.to(dtype or torch.int64)


def draw_randint_like(
    key: Tensor,
    draw: int,
    /,
    self: Tensor,
    *bounds: int,
    dtype: torch.dtype | None = None,
    window: Window | None = None,
    **_: object,
) -> Tensor:
    low, high = bounds if len(bounds) == 2 else (0, bounds[0])
    number = _integers(key, draw, self.shape, low, high, self.device, window)
    return number.to(dtype or self.dtype)


def draw_randperm(
    key: Tensor,
    draw: int,
    /,
    n: int,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    **_: object,
) -> Tensor:
    order = torch.argsort(bits(key, draw, (n,), _device(key, device)), stable=True)
    return order.to(dtype or torch.int64)


def draw_multinomial(
    key: Tensor,
    draw: int,
    /,
    self: Tensor,
    num_samples: int,
    replacement: bool = False,
    *,
    generator: object = None,
) -> Tensor:
    """With replacement by inversion, without by the largest log p + Gumbel noise."""
    if replacement:
        total = torch.cumsum(self, -1)
        shape = (*self.shape[:-1], num_samples)
        number = uniform(key, draw, shape, dtype=_float(self.dtype), device=self.device)
        return torch.searchsorted(total, number.to(self.dtype) * total[..., -1:], right=True)
    noise = -torch.log(-torch.log1p(-_wide_uniform(key, draw, self)))
    return torch.topk(torch.log(self) + noise, num_samples, dim=-1).indices
