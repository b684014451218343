"""Layers that draw: dropout and its kin, attention and recurrent nets with dropout inside.

Each computes what the ATen operator computes, differentiably, with numbers hashed from (key, draw).
On a part of a tensor, `window` says which part of which shape it is (see `random_bits.py`).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .random_bits import Window, chance, uniform


def _keep(key: Tensor, draw: int, tensor: Tensor, p: float, window: Window | None) -> Tensor:
    return chance(key, draw, tensor.shape, tensor.device, 1.0 - p, window)


def _keep_features(
    key: Tensor, draw: int, tensor: Tensor, p: float, window: Window | None
) -> Tensor:
    """One number for all elements of a feature, which dims 0 and 1 name."""
    rest = tensor.ndim - 2
    if window is not None:
        whole, offset = window
        window = [*whole[:2], *[1] * rest], [*offset[:2], *[0] * rest]
    return chance(key, draw, [*tensor.shape[:2], *[1] * rest], tensor.device, 1.0 - p, window)


def _drop(keep: Tensor, tensor: Tensor, p: float) -> Tensor:
    # `where` saves one byte an element for backward, where a product with the mask saves four.
    return torch.where(keep, tensor, 0.0) * _kept_scale(p, tensor)


def _kept_scale(p: float, tensor: Tensor) -> float:
    """1 / (1 - p); on CPU rounded to the tensor's type, as torch's dropout does there."""
    scale = 1.0 / (1.0 - p)
    if tensor.device.type == "cpu" and tensor.dtype == torch.float16:
        (scale,) = struct.unpack("e", struct.pack("e", scale))
    elif tensor.device.type == "cpu" and tensor.dtype == torch.bfloat16:
        (word,) = struct.unpack("I", struct.pack("f", scale))
        word += 0x7FFF + ((word >> 16) & 1)  # to nearest, ties to even
        (scale,) = struct.unpack("f", struct.pack("I", word & 0xFFFF0000))
    return scale


def draw_dropout(
    key: Tensor,
    draw: int,
    /,
    input: Tensor,
    p: float,
    train: bool,
    *,
    window: Window | None = None,
) -> Tensor:
    if not train or p == 0.0:
        return input
    if p == 1.0:
        return input * torch.zeros_like(input)
    return _drop(_keep(key, draw, input, p, window), input, p)


def draw_native_dropout(
    key: Tensor,
    draw: int,
    /,
    input: Tensor,
    p: float,
    train: bool | None,
    *,
    window: Window | None = None,
) -> tuple[Tensor, Tensor]:
    if train is False or p == 0.0:
        return input.clone(), torch.ones_like(input, dtype=torch.bool)
    if p == 1.0:
        return input * torch.zeros_like(input), torch.zeros_like(input, dtype=torch.bool)
    keep = _keep(key, draw, input, p, window)
    return _drop(keep, input, p), keep


def draw_feature_dropout(
    key: Tensor,
    draw: int,
    /,
    input: Tensor,
    p: float,
    train: bool,
    *,
    window: Window | None = None,
) -> Tensor:
    if not train or p == 0.0:
        return input
    return _drop(_keep_features(key, draw, input, p, window), input, p)


def _alpha(keep: Tensor, input: Tensor, p: float) -> Tensor:
    """Dropout that keeps mean and variance after SELU (Klambauer et al., 2017)."""
    saturation = 1.7580993408473766
    scale = 1.0 / math.sqrt((saturation * saturation * p + 1.0) * (1.0 - p))
    noise = keep.to(input.dtype)
    shift = (noise - 1.0) * (saturation * scale) + saturation * scale * p
    return input * (noise * scale) + shift


def draw_alpha_dropout(
    key: Tensor,
    draw: int,
    /,
    input: Tensor,
    p: float,
    train: bool,
    *,
    window: Window | None = None,
) -> Tensor:
    if not train or p == 0.0:
        return input
    return _alpha(_keep(key, draw, input, p, window), input, p)


def draw_feature_alpha_dropout(
    key: Tensor,
    draw: int,
    /,
    input: Tensor,
    p: float,
    train: bool,
    *,
    window: Window | None = None,
) -> Tensor:
    if not train or p == 0.0:
        return input
    return _alpha(_keep_features(key, draw, input, p, window), input, p)


def draw_rrelu(
    key: Tensor,
    draw: int,
    /,
    self: Tensor,
    lower: float = 0.125,
    upper: float = 1.0 / 3.0,
    training: bool = False,
    generator: object = None,
    *,
    window: Window | None = None,
) -> Tensor:
    return draw_rrelu_with_noise(key, draw, self, self, lower, upper, training, window=window)[0]


def draw_rrelu_with_noise(
    key: Tensor,
    draw: int,
    /,
    self: Tensor,
    noise: Tensor,
    lower: float = 0.125,
    upper: float = 1.0 / 3.0,
    training: bool = False,
    generator: object = None,
    *,
    window: Window | None = None,
) -> tuple[Tensor, Tensor]:
    if not training:
        slope = (lower + upper) / 2.0
        return torch.where(self > 0, self, self * slope), noise
    wide = torch.float64 if self.dtype == torch.float64 else torch.float32
    number = uniform(key, draw, self.shape, dtype=wide, device=self.device, window=window)
    slopes = (number * (upper - lower) + lower).to(self.dtype)
    slopes = torch.where(self > 0, 1.0, slopes)
    return self * slopes, slopes


def draw_attention(
    seed: Tensor,
    draw: int,
    /,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    window: Window | None = None,
) -> Tensor:
    """Scaled dot product attention with dropout, in the form of torch's math kernel.

    As there, half precision is computed in single precision on CPU. `window` is of the scores,
    [.., heads, queries, keys].
    """
    result_type = query.dtype
    if query.device.type == "cpu" and result_type in (torch.bfloat16, torch.float16):
        query, key, value = query.float(), key.float(), value.float()
        if attn_mask is not None and attn_mask.dtype != torch.bool:
            attn_mask = attn_mask.float()
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    factor = math.sqrt(1.0 / math.sqrt(query.shape[-1]) if scale is None else scale)
    scores = (query * factor) @ (key * factor).transpose(-2, -1)
    if is_causal:
        size = (query.shape[-2], key.shape[-2])
        attn_mask = torch.ones(size, dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = torch.where(attn_mask, scores, -math.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    weights = torch.ops.aten._safe_softmax(scores, -1)
    dropped = draw_dropout(seed, draw, weights, dropout_p, True, window=window)
    return (dropped @ value).to(result_type)


def draw_recurrent(
    operator: Callable[..., tuple[Tensor, ...]],
    key: Tensor,
    draw: int,
    /,
    *args: Any,
    window: Window | None = None,
) -> tuple[Tensor, ...]:
    """A stack of recurrent layers with dropout between them, one draw after each but the last.

    `args` are those of `aten.lstm.input` and its kin, or (packed sequences) of `aten.lstm.data`.
    `window` is of what a layer passes to the next, [steps, rows, features].
    """
    packed = not isinstance(args[3], bool)
    lead = 2 if packed else 1
    hidden, params, has_biases, num_layers, p, _, bidirectional = args[lead : lead + 7]
    batch_first = False if packed else args[lead + 7]
    data = args[0].transpose(0, 1) if batch_first else args[0]
    states = hidden if isinstance(hidden, (list, tuple)) else [hidden]
    directions, share = 2 if bidirectional else 1, len(params) // num_layers
    finals: list[tuple[Tensor, ...]] = []
    for layer in range(num_layers):
        part = [state[layer * directions : (layer + 1) * directions] for state in states]
        weights = list(params[layer * share : (layer + 1) * share])
        call = [data, *args[1:lead], part if len(states) > 1 else part[0], weights, has_biases]
        call += [1, 0.0, True, bidirectional, *([] if packed else [False])]
        data, *final = operator(*call)
        finals.append(tuple(final))
        if layer + 1 < num_layers:
            data = draw_dropout(key, draw + layer, data, p, True, window=window)
    result = data.transpose(0, 1) if batch_first else data
    return result, *(torch.cat(parts) for parts in zip(*finals, strict=True))
