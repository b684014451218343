"""The models on which partitioned training must equal unpartitioned training exactly.

Tiny configurations of transformers models nobody here wrote, with dropout on where the model has
it, and small nets for what goes wrong in silence: BatchNorm, long skips, no_grad regions,
straight-through estimators, activation checkpointing, autocast. Every factory returns a fresh
model, a batch of `ROWS` rows, keyword inputs and the loss function.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

__all__ = [
    "EXACT_MODELS",
    "IN_FLOAT32",
    "ROWS",
    "SHARDED_MODELS",
    "ExactModel",
    "gradient_hook",
    "sharded_tolerance",
]

ROWS = 4
VOCAB = 96


@dataclass(frozen=True, slots=True)
class ExactModel:
    """A model, one batch, and how its loss is made."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    loss_fn: Callable[..., Tensor] | None = None


def _ids(length: int = 12) -> Tensor:
    return torch.randint(3, VOCAB, (ROWS, length))


def gpt2() -> ExactModel:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=3, n_head=4, n_positions=32, use_cache=False
    )
    ids = _ids()
    return ExactModel(GPT2LMHeadModel(config), (), {"input_ids": ids, "labels": ids})


def llama() -> ExactModel:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        use_cache=False,
    )
    ids = _ids()
    return ExactModel(LlamaForCausalLM(config), (), {"input_ids": ids, "labels": ids})


def bert() -> ExactModel:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=32,
    )
    ids = _ids()
    mask = torch.ones_like(ids)
    mask[:, -3:] = 0
    named = {"input_ids": ids, "attention_mask": mask, "labels": ids}
    return ExactModel(BertForMaskedLM(config), (), named)


def t5() -> ExactModel:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=VOCAB,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        use_cache=False,
    )
    return ExactModel(
        T5ForConditionalGeneration(config), (), {"input_ids": _ids(), "labels": _ids(10)}
    )


def vit() -> ExactModel:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=16,
        patch_size=8,
        hidden_dropout_prob=0.1,
        num_labels=5,
    )
    named = {"pixel_values": torch.randn(ROWS, 3, 16, 16), "labels": torch.randint(5, (ROWS,))}
    return ExactModel(ViTForImageClassification(config), (), named)


def mamba() -> ExactModel:
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(
        vocab_size=VOCAB, hidden_size=32, state_size=4, num_hidden_layers=2, use_cache=False
    )
    ids = _ids(6)
    return ExactModel(MambaForCausalLM(config), (), {"input_ids": ids, "labels": ids})


class _Block(nn.Module):
    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width * stride, 3, stride, 1, bias=False),
            nn.BatchNorm2d(width * stride),
            nn.ReLU(inplace=True),
            nn.Conv2d(width * stride, width * stride, 3, 1, 1, bias=False),
            nn.BatchNorm2d(width * stride),
        )
        self.shortcut = nn.Conv2d(width, width * stride, 1, stride) if stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        side = x if self.shortcut is None else self.shortcut(x)
        return F.relu(self.body(x) + side, inplace=True)


class ResNet(nn.Module):
    """A small residual network with BatchNorm, in the manner of He et al. (2016)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(True))
        self.blocks = nn.Sequential(_Block(8, 1), _Block(8, 2), _Block(16, 1), _Block(16, 2))
        self.head = nn.Linear(32, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def resnet() -> ExactModel:
    batch = (torch.randn(ROWS, 3, 16, 16), torch.randint(7, (ROWS,)))
    return ExactModel(ResNet(), batch, {}, nn.CrossEntropyLoss())


class UNet(nn.Module):
    """Encoder and decoder with long skips, in the manner of Ronneberger et al. (2015)."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()

        def double(inputs: int, outputs: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(True)
            )

        self.down = nn.ModuleList([double(3, width), double(width, 2 * width)])
        self.middle = double(2 * width, 4 * width)
        self.rise = nn.ModuleList(
            [
                nn.ConvTranspose2d(4 * width, 2 * width, 2, 2),
                nn.ConvTranspose2d(2 * width, width, 2, 2),
            ]
        )
        self.up = nn.ModuleList([double(4 * width, 2 * width), double(2 * width, width)])
        self.head = nn.Conv2d(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for down in self.down:
            x = down(x)
            skips.append(x)
            x = F.max_pool2d(x, 2)
        x = self.middle(x)
        for rise, up in zip(self.rise, self.up, strict=True):
            x = up(torch.cat([rise(x), skips.pop()], 1))
        return self.head(x)


def unet() -> ExactModel:
    batch = (torch.randn(ROWS, 3, 16, 16), torch.randn(ROWS, 2, 16, 16))
    return ExactModel(UNet(), batch, {}, F.mse_loss)


class _Translate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCAB, 32)
        self.body = nn.Transformer(32, 4, 2, 2, 64, batch_first=True)
        self.head = nn.Linear(32, VOCAB)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        hidden = self.body(
            self.table(source), self.table(target), tgt_mask=mask, tgt_is_causal=True
        )
        return self.head(hidden)


def _token_loss(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), target.flatten())


def transformer() -> ExactModel:
    target = _ids(8)
    return ExactModel(_Translate(), (_ids(), target, target), {}, _token_loss)


class _Residual(nn.Module):
    """A chain of residual linears; `middle` is what a subclass does between them."""

    def __init__(self, depth: int = 5) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(12, 12) for _ in range(depth))
        self.drop = nn.Dropout(0.2)

    def middle(self, layer: nn.Module, x: Tensor) -> Tensor:
        return torch.tanh(layer(x))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + self.drop(self.middle(layer, x))
        return x


class NoGradRegion(_Residual):
    """A region whose gradient is stopped: lost in silence when inlined without care."""

    def middle(self, layer: nn.Module, x: Tensor) -> Tensor:
        with torch.no_grad():
            scale = layer(x).abs().mean(-1, keepdim=True)
        return torch.tanh(layer(x)) * scale


class Checkpointed(_Residual):
    def middle(self, layer: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(super().middle, layer, x, use_reentrant=False)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + checkpoint(self._dropped, layer, x, use_reentrant=False)
        return x

    def _dropped(self, layer: nn.Module, x: Tensor) -> Tensor:
        return self.drop(torch.tanh(layer(x)))


class Autocast(_Residual):
    def middle(self, layer: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.dtype is torch.float32):
            return torch.tanh(layer(x)).to(x.dtype)


class _Sign(torch.autograd.Function):
    """Sign forward, identity backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.sign(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class StraightThrough(_Residual):
    def middle(self, layer: nn.Module, x: Tensor) -> Tensor:
        return _Sign.apply(layer(x)) * 0.1


class GradientHook(_Residual):
    def middle(self, layer: nn.Module, x: Tensor) -> Tensor:
        y = layer(x)
        if y.requires_grad:
            y.register_hook(lambda gradient: gradient * 0.5)
        return torch.tanh(y)


def _small(kind: type[nn.Module]) -> Callable[[], ExactModel]:
    def make() -> ExactModel:
        batch = (torch.randn(ROWS, 12), torch.randn(ROWS, 12))
        return ExactModel(kind(), batch, {}, F.mse_loss)

    return make


EXACT_MODELS: dict[str, Callable[[], ExactModel]] = {
    "gpt2": gpt2,
    "llama": llama,
    "bert": bert,
    "t5": t5,
    "vit": vit,
    "mamba": mamba,
    "resnet": resnet,
    "unet": unet,
    "transformer": transformer,
    "no_grad": _small(NoGradRegion),
    "checkpoint": _small(Checkpointed),
    "autocast": _small(Autocast),
    "straight_through": _small(StraightThrough),
}

gradient_hook = _small(GradientHook)


def _in_own_precision(make: Callable[[], ExactModel]) -> Callable[[], ExactModel]:
    """A language model that returns logits, with a loss in their precision.

    Transformers takes such losses in float32 even of a model in float64; sums over ranks, taken in
    another order, would then differ by 1e-7.
    """

    def made() -> ExactModel:
        entry = make()
        labels = entry.kwargs["labels"]

        def loss_fn(output: Any, target: Tensor) -> Tensor:
            return F.cross_entropy(output.logits[:, :-1].flatten(0, 1), target[:, 1:].flatten())

        return ExactModel(entry.model, (entry.kwargs["input_ids"], labels), {}, loss_fn)

    return made


SHARDED_MODELS = EXACT_MODELS | {
    name: _in_own_precision(EXACT_MODELS[name]) for name in ("gpt2", "llama", "mamba")
}

IN_FLOAT32 = ("llama", "mamba", "t5")
"""They compute norms in float32 whatever they are in: sums over ranks before a norm differ in the
last bit of float64, and now and then round to another float32."""


def sharded_tolerance(name: str, rounding: float) -> float:
    """How exact loss and gradients of a sharded model in float64 are, where `rounding` is what
    float64 allows."""
    return 1e-5 if name in IN_FLOAT32 else rounding
