"""Layers that draw: dropout and its kin, attention and recurrent nets with dropout inside.

Each computes what the ATen operator computes, differentiably, with numbers hashed from (key, draw).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .random_bits import chance, uniform


def _keep(key: Tensor, draw: int, tensor: Tensor, p: float, *, feature: bool = False) -> Tensor:
    shape = tensor.shape
    if feature:
        shape = torch.Size([*tensor.shape[:2], *[1] * (tensor.ndim - 2)])
    return chance(key, draw, shape, tensor.device, 1.0 - p)


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


def draw_dropout(key: Tensor, draw: int, /, input: Tensor, p: float, train: bool) -> Tensor:
    if not train or p == 0.0:
        return input
    if p == 1.0:
        return input * torch.zeros_like(input)
    return _drop(_keep(key, draw, input, p), input, p)


def draw_native_dropout(
    key: Tensor, draw: int, /, input: Tensor, p: float, train: bool | None
) -> tuple[Tensor, Tensor]:
    if train is False or p == 0.0:
        return input.clone(), torch.ones_like(input, dtype=torch.bool)
    if p == 1.0:
        return input * torch.zeros_like(input), torch.zeros_like(input, dtype=torch.bool)
    keep = _keep(key, draw, input, p)
    return _drop(keep, input, p), keep


def draw_feature_dropout(key: Tensor, draw: int, /, input: Tensor, p: float, train: bool) -> Tensor:
    if not train or p == 0.0:
        return input
    return _drop(_keep(key, draw, input, p, feature=True), input, p)


def _alpha(key: Tensor, draw: int, input: Tensor, p: float, *, feature: bool) -> Tensor:
    """Dropout that keeps mean and variance after SELU (Klambauer et al., 2017)."""
    saturation = 1.7580993408473766
    scale = 1.0 / math.sqrt((saturation * saturation * p + 1.0) * (1.0 - p))
    noise = _keep(key, draw, input, p, feature=feature).to(input.dtype)
    shift = (noise - 1.0) * (saturation * scale) + saturation * scale * p
    return input * (noise * scale) + shift


def draw_alpha_dropout(key: Tensor, draw: int, /, input: Tensor, p: float, train: bool) -> Tensor:
    return input if not train or p == 0.0 else _alpha(key, draw, input, p, feature=False)


def draw_feature_alpha_dropout(
    key: Tensor, draw: int, /, input: Tensor, p: float, train: bool
) -> Tensor:
    return input if not train or p == 0.0 else _alpha(key, draw, input, p, feature=True)


def draw_rrelu(
    key: Tensor,
    draw: int,
    /,
    self: Tensor,
    lower: float = 0.125,
    upper: float = 1.0 / 3.0,
    training: bool = False,
    generator: object = None,
) -> Tensor:
    return draw_rrelu_with_noise(key, draw, self, self, lower, upper, training)[0]


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
) -> tuple[Tensor, Tensor]:
    if not training:
        slope = (lower + upper) / 2.0
        return torch.where(self > 0, self, self * slope), noise
    slopes = (
        uniform(key, draw, self.shape, dtype=_float(self.dtype), device=self.device)
        * (upper - lower)
        + lower
    ).to(self.dtype)
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
) -> Tensor:
    """Scaled dot product attention with dropout, in the form of torch's math kernel.

    As there, half precision is computed in single precision on CPU.
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
    return (draw_dropout(seed, draw, weights, dropout_p, True) @ value).to(result_type)


def draw_recurrent(
    operator: Callable[..., tuple[Tensor, ...]], key: Tensor, draw: int, /, *args: Any
) -> tuple[Tensor, ...]:
    """A stack of recurrent layers with dropout between them, one draw after each but the last.

    `args` are those of `aten.lstm.input` and its kin, or (packed sequences) of `aten.lstm.data`.
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
            data = draw_dropout(key, draw + layer, data, p, True)
    result = data.transpose(0, 1) if batch_first else data
    return result, *(torch.cat(parts) for parts in zip(*finals, strict=True))


def _float(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
