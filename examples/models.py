"""Models for the examples and the command line: each function returns a model and a batch for it.

cutset plan examples/models.py:gpt2 --devices 4 -o plan.json
cutset run examples/models.py:gpt2 --plan plan.json --steps 3 --compare
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

__all__ = ["gpt2", "mlp", "unet"]


def mlp() -> dict[str, Any]:
    """A classifier of four layers, with a loss function that takes targets."""
    layers: list[nn.Module] = []
    for _ in range(3):
        layers += [nn.Linear(64, 64), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(64, 10))
    args = (torch.randn(16, 64), torch.randint(0, 10, (16,)))
    return {"model": model, "args": args, "loss_fn": F.cross_entropy}


def gpt2(
    num_layers: int = 12, width: int = 192, length: int = 64, batch_size: int = 8
) -> tuple[nn.Module, tuple[()], dict[str, torch.Tensor]]:
    """GPT-2 of transformers with its dropout and its tied weights; it returns its own loss."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_layer=num_layers,
        n_embd=width,
        n_head=width // 48,
        vocab_size=1024,
        n_positions=length,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    ids = torch.randint(0, config.vocab_size, (batch_size, length))
    return GPT2LMHeadModel(config).train(), (), {"input_ids": ids, "labels": ids}


class _ConvBlock(nn.Sequential):
    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__(
            nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels_out),
            nn.ReLU(),
        )


class UNet(nn.Module):
    """Down, up, and a skip from every level to its mirror image."""

    def __init__(self, channels: int = 8, num_levels: int = 3) -> None:
        super().__init__()
        widths = [channels * 2**level for level in range(num_levels)]
        self.down = nn.ModuleList(
            _ConvBlock(before, after) for before, after in zip([3, *widths], widths, strict=False)
        )
        self.middle = _ConvBlock(widths[-1], widths[-1])
        self.up = nn.ModuleList(
            _ConvBlock(2 * width, max(width // 2, channels)) for width in reversed(widths)
        )
        self.head = nn.Conv2d(channels, 1, 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        skips = []
        hidden = image
        for block in self.down:
            hidden = block(hidden)
            skips.append(hidden)
            hidden = F.max_pool2d(hidden, 2)
        hidden = self.middle(hidden)
        for block in self.up:
            hidden = F.interpolate(hidden, scale_factor=2.0)
            hidden = block(torch.cat([hidden, skips.pop()], dim=1))
        return self.head(hidden)


def unet() -> dict[str, Any]:
    """A U-Net with BatchNorm: its long skips cross stages."""
    image = torch.randn(8, 3, 32, 32)
    target = (image.mean(1, keepdim=True) > 0).to(image.dtype)
    loss_fn = F.binary_cross_entropy_with_logits
    return {"model": UNet(), "args": (image, target), "loss_fn": loss_fn}
