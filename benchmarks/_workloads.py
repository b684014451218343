"""Models on which predictions are measured, in sizes that take a core 0.1 to 1 second a step.

Models of transformers with random weights, and two convolutional nets; those for a GPU take it
about as long, in bf16.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import gpu_llama
import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["ON_CPU", "ON_CUDA", "Workload"]


@dataclass(frozen=True, slots=True)
class Workload:
    """A model, one batch, and how its loss is made."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    loss_fn: Callable[..., Tensor] | None = None


def _tokens(rows: int, length: int, vocabulary: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, vocabulary, (rows, length), generator=generator)


def _images(rows: int, size: int) -> Tensor:
    return torch.randn(rows, 3, size, size, generator=torch.Generator().manual_seed(2))


def _labels(rows: int, classes: int) -> Tensor:
    return torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(3))


def _language_model(model: nn.Module, rows: int, length: int, vocabulary: int) -> Workload:
    ids = _tokens(rows, length, vocabulary)
    return Workload(model, (), {"input_ids": ids, "labels": ids})


def gpt2() -> Workload:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=2048,
        n_embd=256,
        n_layer=4,
        n_head=4,
        n_positions=128,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
    )
    return _language_model(GPT2LMHeadModel(config), 16, 64, 2048)


def llama() -> Workload:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        use_cache=False,
    )
    return _language_model(LlamaForCausalLM(config), 16, 64, 4096)


def bert() -> Workload:
    """With dropout, as it is trained."""
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=2048,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=1024,
        max_position_embeddings=64,
    )
    ids = _tokens(16, 48, 2048)
    named = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    return Workload(BertForMaskedLM(config), (), named)


def t5() -> Workload:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=2048,
        d_model=256,
        d_kv=32,
        d_ff=1024,
        num_layers=2,
        num_heads=8,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        use_cache=False,
    )
    named = {"input_ids": _tokens(16, 48, 2048), "labels": _tokens(16, 32, 2048)}
    return Workload(T5ForConditionalGeneration(config), (), named)


def vit() -> Workload:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=1024,
        image_size=64,
        patch_size=8,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=100,
    )
    named = {"pixel_values": _images(16, 64), "labels": _labels(16, 100)}
    return Workload(ViTForImageClassification(config), (), named)


def mixtral() -> Workload:
    """A mixture of four experts, each token through two."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=2048,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        use_cache=False,
    )
    config._experts_implementation = "batched_mm"
    return _language_model(MixtralForCausalLM(config), 16, 16, 2048)


class _Residual(nn.Module):
    """Two convolutions beside a skip, with GroupNorm."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, inputs), nn.GroupNorm(8, outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1)
        alike = inputs == outputs and stride == 1
        self.skip = nn.Identity() if alike else nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)))
        return self.skip(x) + self.conv2(F.silu(self.norm2(hidden)))


class _UNet(nn.Module):
    """Encoder and decoder with long skips, after Ronneberger et al. (2015)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.down1 = _Residual(width, 2 * width, 2)
        self.down2 = _Residual(2 * width, 4 * width, 2)
        self.middle = nn.Sequential(
            _Residual(4 * width, 4 * width), _Residual(4 * width, 4 * width)
        )
        self.up2 = nn.ConvTranspose2d(4 * width, 2 * width, 2, 2)
        self.mix2 = _Residual(4 * width, 2 * width)
        self.up1 = nn.ConvTranspose2d(2 * width, width, 2, 2)
        self.mix1 = _Residual(2 * width, width)
        self.head = nn.Conv2d(width, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.stem(x)
        second = self.down1(first)
        hidden = self.middle(self.down2(second))
        hidden = self.mix2(torch.cat([self.up2(hidden), second], 1))
        return self.head(self.mix1(torch.cat([self.up1(hidden), first], 1)))


def unet() -> Workload:
    return Workload(_UNet(24), (_images(16, 48), _images(16, 48)), {}, F.mse_loss)


def resnet() -> Workload:
    """Bottlenecks with BatchNorm, whose statistics are those of a microbatch."""
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        embedding_size=32,
        hidden_sizes=[64, 128, 256],
        depths=[2, 2, 2],
        layer_type="bottleneck",
        num_labels=100,
    )
    named = {"pixel_values": _images(16, 96), "labels": _labels(16, 100)}
    return Workload(ResNetForImageClassification(config), (), named)


ON_CPU: dict[str, Callable[[], Workload]] = {
    "gpt2": gpt2,
    "llama": llama,
    "bert": bert,
    "t5": t5,
    "vit": vit,
    "mixtral": mixtral,
    "unet": unet,
    "resnet": resnet,
}


def _llama_on_cuda(size: str, rows: int, length: int) -> Workload:
    ids = _tokens(rows, length, 128256 if size != "tiny" else 32000)
    return Workload(gpu_llama.build(size, length), (ids, ids.roll(-1, 1)), {})


def _gpt2_on_cuda() -> Workload:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_embd=1280, n_layer=36, n_head=20, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    config.use_cache = False
    return _language_model(GPT2LMHeadModel(config).bfloat16(), 16, 1024, config.vocab_size)


def _bert_on_cuda() -> Workload:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=4096,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return _language_model(BertForMaskedLM(config).bfloat16(), 32, 512, config.vocab_size)


def _vit_on_cuda() -> Workload:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=4096,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=1000,
    )
    named = {"pixel_values": _images(64, 224).bfloat16(), "labels": _labels(64, 1000)}
    return Workload(ViTForImageClassification(config).bfloat16(), (), named)


ON_CUDA: dict[str, Callable[[], Workload]] = {
    "llama-1b": partial(_llama_on_cuda, "1b", 16, 2048),
    "llama-8b": partial(_llama_on_cuda, "8b", 16, 2048),
    "gpt2-large": _gpt2_on_cuda,
    "bert-large": _bert_on_cuda,
    "vit-large": _vit_on_cuda,
}
