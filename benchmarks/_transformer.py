"""The model of the pipeline benchmark: a plain pre-norm transformer, and its cut into stages."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

__all__ = ["Shape", "Transformer", "cut_points", "make_batch", "make_stage", "token_loss"]


@dataclass(frozen=True)
class Shape:
    """Sizes of the model and its batch."""

    num_layers: int = 8
    width: int = 256
    num_heads: int = 4
    vocabulary: int = 512
    length: int = 128
    batch_size: int = 16


class Block(nn.Module):
    """Attention and MLP, each behind a norm and beside a skip."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        batch, length, width = hidden.shape
        heads = self.qkv(self.norm1(hidden)).view(batch, length, 3, self.num_heads, -1)
        query, key, value = heads.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return hidden + self.down(F.gelu(self.up(self.norm2(hidden))))


class Transformer(nn.Module):
    """Token ids to logits."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed = nn.Embedding(shape.vocabulary, shape.width)
        self.blocks = nn.ModuleList(
            Block(shape.width, shape.num_heads) for _ in range(shape.num_layers)
        )
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, shape.vocabulary)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(ids)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(self.norm(hidden))


class Stage(nn.Module):
    """Consecutive blocks of a `Transformer`, with its ends where they belong."""

    def __init__(self, model: Transformer, begin: int, end: int) -> None:
        super().__init__()
        self.embed = model.embed if begin == 0 else None
        self.blocks = model.blocks[begin:end]
        last = end == len(model.blocks)
        self.norm, self.head = (model.norm, model.head) if last else (None, None)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden if self.embed is None else self.embed(hidden)
        for block in self.blocks:
            hidden = block(hidden)
        return hidden if self.head is None else self.head(self.norm(hidden))


def cut_points(num_layers: int, num_stages: int) -> list[int]:
    """First block of every stage, and the number of blocks at the end."""
    return [num_layers * stage // num_stages for stage in range(num_stages + 1)]


def make_stage(model: Transformer, stage: int, num_stages: int) -> Stage:
    """Stage number `stage` of `model`, whose parameters it shares."""
    cuts = cut_points(len(model.blocks), num_stages)
    return Stage(model, cuts[stage], cuts[stage + 1])


def make_batch(shape: Shape) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and their successors."""
    generator = torch.Generator().manual_seed(1)
    size = (shape.batch_size, shape.length)
    ids = torch.randint(0, shape.vocabulary, size, generator=generator)
    return ids, ids.roll(-1, 1)


def token_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy over all tokens."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
