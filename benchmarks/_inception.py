"""Inception v3 (Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", 2016)
without its auxiliary classifier, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["InceptionV3"]

_Size = int | tuple[int, int]


class Conv(nn.Sequential):
    """Convolution, batch norm, ReLU."""

    def __init__(
        self, inputs: int, outputs: int, kernel: _Size, stride: int = 1, padding: _Size = 0
    ):
        super().__init__(
            nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False),
            nn.BatchNorm2d(outputs, eps=0.001),
            nn.ReLU(inplace=True),
        )


class Mixed(nn.Module):
    """Branches on one input, joined along the channels."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)


def _pooled(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.AvgPool2d(3, 1, 1), Conv(inputs, outputs, 1))


def _squares(inputs: int, pool: int) -> Mixed:
    return Mixed(
        Conv(inputs, 64, 1),
        nn.Sequential(Conv(inputs, 48, 1), Conv(48, 64, 5, padding=2)),
        nn.Sequential(Conv(inputs, 64, 1), Conv(64, 96, 3, padding=1), Conv(96, 96, 3, padding=1)),
        _pooled(inputs, pool),
    )


def _rows_and_columns(width: int) -> Mixed:
    """7x7 convolutions as rows and columns."""
    row, column = {"kernel": (1, 7), "padding": (0, 3)}, {"kernel": (7, 1), "padding": (3, 0)}
    return Mixed(
        Conv(768, 192, 1),
        nn.Sequential(Conv(768, width, 1), Conv(width, width, **row), Conv(width, 192, **column)),
        nn.Sequential(
            Conv(768, width, 1),
            Conv(width, width, **column),
            Conv(width, width, **row),
            Conv(width, width, **column),
            Conv(width, 192, **row),
        ),
        _pooled(768, 192),
    )


def _split(inputs: int) -> Mixed:
    return Mixed(
        Conv(inputs, 384, (1, 3), padding=(0, 1)), Conv(inputs, 384, (3, 1), padding=(1, 0))
    )


def _wide(inputs: int) -> Mixed:
    return Mixed(
        Conv(inputs, 320, 1),
        nn.Sequential(Conv(inputs, 384, 1), _split(384)),
        nn.Sequential(Conv(inputs, 448, 1), Conv(448, 384, 3, padding=1), _split(384)),
        _pooled(inputs, 192),
    )


class InceptionV3(nn.Module):
    """Images (rows, 3, size, size) with size of at least 75 to scores of 1,000 classes."""

    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            Conv(3, 32, 3, stride=2),
            Conv(32, 32, 3),
            Conv(32, 64, 3, padding=1),
            nn.MaxPool2d(3, 2),
            Conv(64, 80, 1),
            Conv(80, 192, 3),
            nn.MaxPool2d(3, 2),
        )
        self.blocks = nn.Sequential(
            _squares(192, 32),
            _squares(256, 64),
            _squares(288, 64),
            Mixed(
                Conv(288, 384, 3, stride=2),
                nn.Sequential(
                    Conv(288, 64, 1), Conv(64, 96, 3, padding=1), Conv(96, 96, 3, stride=2)
                ),
                nn.MaxPool2d(3, 2),
            ),
            _rows_and_columns(128),
            _rows_and_columns(160),
            _rows_and_columns(160),
            _rows_and_columns(192),
            Mixed(
                nn.Sequential(Conv(768, 192, 1), Conv(192, 320, 3, stride=2)),
                nn.Sequential(
                    Conv(768, 192, 1),
                    Conv(192, 192, (1, 7), padding=(0, 3)),
                    Conv(192, 192, (7, 1), padding=(3, 0)),
                    Conv(192, 192, 3, stride=2),
                ),
                nn.MaxPool2d(3, 2),
            ),
            _wide(1280),
            _wide(2048),
        )
        self.head = nn.Linear(2048, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))
