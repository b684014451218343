"""What an example of a model is, and the inputs and configurations that many of them share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

__all__ = [
    "BART",
    "BERT",
    "BODY",
    "CLIP",
    "GPT",
    "LLAMA",
    "ROWS",
    "T5",
    "TOKENS",
    "VIT",
    "VOCABULARY",
    "Example",
    "ids",
    "masked",
    "mean_square",
    "pair",
    "text",
    "transformers_model",
    "with_dtype",
]

ROWS = 4
VOCABULARY = 64
LENGTH = 12

Inputs = Callable[[], dict[str, Tensor]]


@dataclass(frozen=True, slots=True)
class Example:
    """A model, a call of it, and what makes a loss of its result."""

    model: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    loss_fn: Callable[..., Tensor] | None = None


def mean_square(result: object) -> Tensor:
    """Sum over all float results of their mean square, so that every output has a gradient."""
    terms = [
        leaf.square().mean()
        for leaf in pytree.tree_leaves(result)
        if isinstance(leaf, Tensor) and leaf.is_floating_point()
    ]
    return torch.stack(terms).sum()


def with_dtype(example: Example, dtype: torch.dtype) -> Example:
    """The example with its model and its float inputs in `dtype`."""

    def cast(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            return leaf.to(dtype)
        return leaf

    args, kwargs = pytree.tree_map(cast, (example.args, dict(example.kwargs)))
    return replace(example, model=example.model.to(dtype), args=args, kwargs=kwargs)


def ids(length: int = LENGTH) -> Tensor:
    return torch.randint(3, VOCABULARY, (ROWS, length))


def text() -> dict[str, Tensor]:
    return {"input_ids": ids()}


def masked() -> dict[str, Tensor]:
    mask = torch.ones(ROWS, LENGTH, dtype=torch.long)
    mask[1, -3:] = 0
    return {"input_ids": ids(), "attention_mask": mask}


def pair() -> dict[str, Tensor]:
    return {"input_ids": ids(), "decoder_input_ids": ids(8)}


TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BODY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
BERT = TOKENS | BODY | {"max_position_embeddings": 32}
LLAMA = BERT | {"num_key_value_heads": 2}
GPT = TOKENS | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
BART = TOKENS | {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 32,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
    "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
}
T5 = TOKENS | {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
VIT = BODY | {"image_size": 32, "patch_size": 8}
CLIP = {"text_config": BERT, "vision_config": VIT, "projection_dim": 16}


def transformers_model(kind: str, inputs: Inputs, **config: Any) -> Callable[[], Example]:
    """A factory of class `kind` of transformers, with `config`; caches are off."""

    def make() -> Example:
        import transformers

        model_class = getattr(transformers, kind)
        settings = model_class.config_class(**config)
        if hasattr(settings, "use_cache"):
            settings.use_cache = False
        if "num_experts_per_tok" in config:
            settings._experts_implementation = "batched_mm"
        return Example(model_class(settings), (), inputs(), mean_square)

    return make
