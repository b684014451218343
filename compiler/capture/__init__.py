"""From an unmodified `nn.Module` and example inputs to a graph of ATen ops (`capture`)."""

from __future__ import annotations

from .blocks import Block, BlockInstance, find_blocks
from .capture import Captured, capture

__all__ = ["Block", "BlockInstance", "Captured", "capture", "find_blocks"]
