"""From an unmodified `nn.Module` and example inputs to a graph of ATen ops (`capture`)."""

from __future__ import annotations

from .capture import Captured, capture

__all__ = ["Captured", "capture"]
