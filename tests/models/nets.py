"""Small plain-torch networks, each with one thing that a graph compiler can get wrong."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

__all__ = [
    "Autocast",
    "Checkpointed",
    "GradientHook",
    "Inception",
    "InPlaceView",
    "NoGradRegion",
    "Recurrent",
    "ResidualNet",
    "Seq2Seq",
    "StraightThrough",
    "UNet",
]


def _conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """Convolution, BatchNorm and an in-place ReLU; the bias has a gradient of zero."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


class _Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _conv(inputs, outputs, 3, stride),
            nn.Conv2d(outputs, outputs, 3, padding=1),
            nn.BatchNorm2d(outputs),
        )
        self.skip = nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        y += self.skip(x)
        return y.relu_()


class ResidualNet(nn.Module):
    """A small ResNet: images to class scores."""

    def __init__(self, width: int = 8, num_classes: int = 10) -> None:
        super().__init__()
        self.stem = _conv(3, width)
        self.layers = nn.Sequential(
            _Residual(width, width, 1),
            _Residual(width, 2 * width, 2),
            _Residual(2 * width, 4 * width, 2),
        )
        self.head = nn.Linear(4 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.stem(x)).mean((2, 3)))


class UNet(nn.Module):
    """Long skips from the way down to the way up."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.down1, self.down2 = _conv(3, width), _conv(width, 2 * width)
        self.bottom = _conv(2 * width, 4 * width)
        self.up2 = nn.ConvTranspose2d(4 * width, 2 * width, 2, 2)
        self.merge2 = _conv(4 * width, 2 * width)
        self.up1 = nn.ConvTranspose2d(2 * width, width, 2, 2)
        self.merge1 = _conv(2 * width, width)
        self.head = nn.Conv2d(width, 2, 1)
        self.pool = nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        first = self.down1(x)
        second = self.down2(self.pool(first))
        y = self.up2(self.bottom(self.pool(second)))
        y = self.up1(self.merge2(torch.cat([y, second], 1)))
        return self.head(self.merge1(torch.cat([y, first], 1)))


class _Mixed(nn.Module):
    """Four parallel branches, joined by channels."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.one = _conv(inputs, width, 1)
        self.three = nn.Sequential(_conv(inputs, width, 1), _conv(width, width, 3))
        self.five = nn.Sequential(_conv(inputs, width, 1), _conv(width, width, 5))
        self.pool = nn.Sequential(nn.MaxPool2d(3, 1, 1), _conv(inputs, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.one(x), self.three(x), self.five(x), self.pool(x)], 1)


class Inception(nn.Module):
    """A small Inception: every block is four branches wide."""

    def __init__(self, width: int = 4, num_blocks: int = 3, num_classes: int = 10) -> None:
        super().__init__()
        self.stem = _conv(3, 4 * width, 3, 2)
        self.blocks = nn.ModuleList(_Mixed(4 * width, width) for _ in range(num_blocks))
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(4 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        x = nn.functional.adaptive_avg_pool2d(x, 1).flatten(1)
        return self.head(self.dropout(x))


class Seq2Seq(nn.Module):
    """`nn.Transformer` with dropout and a causal mask."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.transformer = nn.Transformer(width, 4, 2, 2, 2 * width, batch_first=True)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1], dtype=source.dtype)
        return self.transformer(source, target, tgt_mask=mask, tgt_is_causal=True)


class Recurrent(nn.Module):
    """A two-layer LSTM with dropout between the layers."""

    def __init__(self, vocabulary: int = 64, width: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.lstm = nn.LSTM(width, width, 2, batch_first=True, dropout=0.3)
        self.gru = nn.GRU(width, width, 3, dropout=0.2, bidirectional=True)
        self.head = nn.Linear(2 * width, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        hidden, _ = self.lstm(self.embedding(ids))
        hidden, _ = self.gru(hidden)
        return self.head(hidden)


class _Layers(nn.Module):
    """Four layers with dropout; subclasses decide how they are run."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.Dropout(0.2), nn.Tanh()) for _ in range(4)
        )
        self.head = nn.Linear(width, width)


class NoGradRegion(_Layers):
    """A region without gradients, with a region with gradients inside it."""

    def forward(self, x: Tensor) -> Tensor:
        first, second, third, fourth = self.layers
        x = first(x)
        with torch.no_grad():
            frozen = second(x)
            with torch.enable_grad():
                inner = third(x) * frozen
            frozen = frozen * 2.0
        return self.head(fourth(x + frozen) + inner)


class _Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.sign()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return gradient


class StraightThrough(_Layers):
    """Binarises activations; the gradient passes straight through."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + _Sign.apply(layer(x))
        return self.head(x)


class GradientHook(_Layers):
    """Halves the gradient of an activation by a hook."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
            if x.requires_grad:
                x.register_hook(lambda gradient: gradient * 0.5)
        return self.head(x)


class Checkpointed(_Layers):
    """Recomputes every layer, dropout included, in the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + checkpoint(layer, x, use_reentrant=False)
        return self.head(x)


class Autocast(_Layers):
    """Runs its middle in bfloat16."""

    def forward(self, x: Tensor) -> Tensor:
        first, *rest, last = self.layers
        x = first(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for layer in rest:
                x = layer(x)
        return self.head(last(x.to(self.head.weight.dtype)))


class InPlaceView(_Layers):
    """Writes into views of activations."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).clone()
            x[:, 0].mul_(2.0)
            x[:, 1:3] += x[:, 3:5]
            x.transpose(0, 1)[4] = x[:, 5]
        return self.head(x)
