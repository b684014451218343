"""Many model classes in tiny configurations, as examples for capture and for the benchmarks.

`ZOO` maps a name to a factory of an `Example`: an unmodified model of transformers or of plain
torch (`PLAIN`), a call of it, and a loss function. Nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from . import nets
from .example import ROWS, Example, mean_square, with_dtype
from .media import AUDIO, MULTIMODAL, VISION
from .text import CAUSAL, ENCODER_DECODER, MASKED

__all__ = ["GROUPS", "PLAIN", "ROWS", "ZOO", "Example", "mean_square", "with_dtype"]


def _net(kind: type[nn.Module], *inputs: Callable[[], Tensor]) -> Callable[[], Example]:
    return lambda: Example(kind(), tuple(make() for make in inputs), {}, mean_square)


def _pixels() -> Tensor:
    return torch.randn(ROWS, 3, 16, 16)


def _vectors() -> Tensor:
    return torch.randn(ROWS, 16)


PLAIN: dict[str, Callable[[], Example]] = {
    "autocast": _net(nets.Autocast, _vectors),
    "checkpointed": _net(nets.Checkpointed, _vectors),
    "in_place_view": _net(nets.InPlaceView, _vectors),
    "inception": _net(nets.Inception, _pixels),
    "no_grad_region": _net(nets.NoGradRegion, _vectors),
    "recurrent": _net(nets.Recurrent, lambda: torch.randint(0, 64, (ROWS, 7))),
    "residual_net": _net(nets.ResidualNet, _pixels),
    "seq2seq": _net(
        nets.Seq2Seq, lambda: torch.randn(ROWS, 6, 32), lambda: torch.randn(ROWS, 5, 32)
    ),
    "unet": _net(nets.UNet, _pixels),
}

GROUPS: dict[str, dict[str, Callable[[], Example]]] = {
    "plain": PLAIN,
    "causal": CAUSAL,
    "masked": MASKED,
    "encoder-decoder": ENCODER_DECODER,
    "vision": VISION,
    "audio": AUDIO,
    "multimodal": MULTIMODAL,
}

ZOO: dict[str, Callable[[], Example]] = {
    name: make for group in GROUPS.values() for name, make in group.items()
}
