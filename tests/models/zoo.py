"""Many model classes in tiny configurations, as examples for capture and for the benchmarks.

`ZOO` maps a name to a factory of an `Example`: an unmodified model of transformers or of plain
torch, a call of it, and a loss function. Nothing is downloaded. Batch size is 2 throughout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from . import nets

__all__ = ["PLAIN", "ZOO", "Example", "mean_square", "with_dtype"]

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


# --- inputs ----------------------------------------------------------------------------------


def _ids(length: int = LENGTH) -> Tensor:
    return torch.randint(3, VOCABULARY, (2, length))


def _text() -> dict[str, Tensor]:
    return {"input_ids": _ids()}


def _masked() -> dict[str, Tensor]:
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, -3:] = 0
    return {"input_ids": _ids(), "attention_mask": mask}


def _pair() -> dict[str, Tensor]:
    return {"input_ids": _ids(), "decoder_input_ids": _ids(8)}


def _image(size: int = 32) -> Inputs:
    return lambda: {"pixel_values": torch.randn(2, 3, size, size)}


def _wave(length: int = 1600) -> Inputs:
    return lambda: {"input_values": torch.randn(2, length)}


def _mel(bins: int, frames: int) -> Inputs:
    return lambda: {"input_features": torch.randn(2, bins, frames), "decoder_input_ids": _ids(8)}


def _image_and_text(size: int = 32) -> Inputs:
    return lambda: {**_masked(), "pixel_values": torch.randn(2, 3, size, size)}


# --- configurations --------------------------------------------------------------------------

_TOKENS = dict(vocab_size=VOCABULARY, pad_token_id=0, bos_token_id=1, eos_token_id=2)
_BODY = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
)
_BERT = _TOKENS | _BODY | dict(max_position_embeddings=32)
_LLAMA = _BERT | dict(num_key_value_heads=2)
_WIDE = _LLAMA | dict(head_dim=8)
_GPT = _TOKENS | dict(n_embd=32, n_layer=2, n_head=4, n_positions=32)
_BART = _TOKENS | dict(
    d_model=32,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=64,
    decoder_ffn_dim=64,
    max_position_embeddings=32,
    decoder_start_token_id=1,
    forced_eos_token_id=None,
)
_T5 = _TOKENS | dict(
    d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0
)
_VIT = _BODY | dict(image_size=32, patch_size=8)
_STAGES = dict(hidden_sizes=[8, 16, 16, 32], depths=[1, 1, 1, 1])
_EXPERTS = dict(
    num_experts=4,
    num_local_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    shared_expert_intermediate_size=32,
)
_WAV = _BODY | dict(
    vocab_size=VOCABULARY,
    conv_dim=(16, 16),
    conv_kernel=(10, 4),
    conv_stride=(5, 4),
    num_feat_extract_layers=2,
    num_conv_pos_embeddings=8,
    num_conv_pos_embedding_groups=4,
    mask_time_prob=0.0,
    mask_feature_prob=0.0,
    layerdrop=0.0,
)
_CLIP_TEXT = _BERT
_CLIP_IMAGE = _VIT
_CLIP = dict(text_config=_CLIP_TEXT, vision_config=_CLIP_IMAGE, projection_dim=16)


def _hf(kind: str, inputs: Inputs, **config: Any) -> Callable[[], Example]:
    """A factory of class `kind` of transformers, with `config`; caches are off."""

    def make() -> Example:
        import transformers

        model_class = getattr(transformers, kind)
        settings = model_class.config_class(**config)
        if hasattr(settings, "use_cache"):
            settings.use_cache = False
        if "num_experts_per_tok" in config:
            settings._experts_implementation = "grouped_mm"
        return Example(model_class(settings), (), inputs(), mean_square)

    return make


def _net(kind: type[nn.Module], inputs: Callable[[], tuple[Tensor, ...]]) -> Callable[[], Example]:
    return lambda: Example(kind(), inputs(), {}, mean_square)


def _pixels() -> tuple[Tensor, ...]:
    return (torch.randn(2, 3, 16, 16),)


def _vectors() -> tuple[Tensor, ...]:
    return (torch.randn(6, 16),)


_DEEPSEEK = _WIDE | dict(
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_rope_head_dim=8,
    qk_nope_head_dim=8,
    v_head_dim=8,
    n_routed_experts=4,
    n_shared_experts=1,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    first_k_dense_replace=1,
    n_group=1,
    topk_group=1,
    num_key_value_heads=4,
)

_CAUSAL = {
    "bigcode": _hf("GPTBigCodeForCausalLM", _text, **_GPT),
    "biogpt": _hf("BioGptForCausalLM", _text, **_BERT, layerdrop=0.0),
    "bloom": _hf("BloomForCausalLM", _text, **_TOKENS, hidden_size=32, n_layer=2, n_head=4),
    "codegen": _hf("CodeGenForCausalLM", _text, **_GPT, rotary_dim=4),
    "cohere": _hf("CohereForCausalLM", _text, **_LLAMA),
    "ctrl": _hf("CTRLLMHeadModel", _text, **_GPT, dff=64),
    "deepseek_v2": _hf("DeepseekV2ForCausalLM", _text, **_DEEPSEEK),
    "deepseek_v3": _hf("DeepseekV3ForCausalLM", _text, **_DEEPSEEK),
    "falcon": _hf(
        "FalconForCausalLM", _text, **_TOKENS, hidden_size=32, num_hidden_layers=2, num_attention_heads=4
    ),
    "gemma": _hf("GemmaForCausalLM", _text, **_WIDE),
    "gemma2": _hf("Gemma2ForCausalLM", _text, **_WIDE, sliding_window=8),
    "glm": _hf("GlmForCausalLM", _text, **_WIDE),
    "gpt2": _hf("GPT2LMHeadModel", _text, **_GPT),
    "gpt_neo": _hf(
        "GPTNeoForCausalLM",
        _text,
        **_TOKENS,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        max_position_embeddings=32,
    ),
    "gpt_neox": _hf("GPTNeoXForCausalLM", _text, **_BERT),
    "gptj": _hf("GPTJForCausalLM", _text, **_GPT, rotary_dim=4),
    "granite": _hf("GraniteForCausalLM", _text, **_LLAMA),
    "helium": _hf("HeliumForCausalLM", _text, **_WIDE),
    "llama": _hf("LlamaForCausalLM", _text, **_LLAMA),
    "mamba": _hf("MambaForCausalLM", _text, **_TOKENS, hidden_size=32, state_size=4, num_hidden_layers=2),
    "mistral": _hf("MistralForCausalLM", _text, **_LLAMA, sliding_window=8),
    "mixtral": _hf("MixtralForCausalLM", _text, **_LLAMA, **_EXPERTS),
    "mpt": _hf("MptForCausalLM", _text, **_TOKENS, d_model=32, n_heads=4, n_layers=2, max_seq_len=32),
    "nemotron": _hf("NemotronForCausalLM", _text, **_WIDE),
    "olmo": _hf("OlmoForCausalLM", _text, **_LLAMA),
    "olmo2": _hf("Olmo2ForCausalLM", _text, **_LLAMA),
    "openai_gpt": _hf("OpenAIGPTLMHeadModel", _text, **_GPT),
    "opt": _hf("OPTForCausalLM", _text, **_BERT, ffn_dim=64, word_embed_proj_dim=32, layerdrop=0.0),
    "persimmon": _hf("PersimmonForCausalLM", _text, **_BERT),
    "phi": _hf("PhiForCausalLM", _text, **_LLAMA),
    "phi3": _hf("Phi3ForCausalLM", _text, **_LLAMA),
    "qwen2": _hf("Qwen2ForCausalLM", _text, **_LLAMA),
    "qwen2_moe": _hf("Qwen2MoeForCausalLM", _text, **_LLAMA, **_EXPERTS),
    "qwen3": _hf("Qwen3ForCausalLM", _text, **_WIDE),
    "qwen3_moe": _hf("Qwen3MoeForCausalLM", _text, **_WIDE, **_EXPERTS),
    "smollm3": _hf("SmolLM3ForCausalLM", _text, **_LLAMA),
    "stablelm": _hf("StableLmForCausalLM", _text, **_LLAMA),
    "starcoder2": _hf("Starcoder2ForCausalLM", _text, **_LLAMA),
    "xglm": _hf(
        "XGLMForCausalLM", _text, **_TOKENS, d_model=32, ffn_dim=64, num_layers=2, attention_heads=4,
        max_position_embeddings=32, layerdrop=0.0,
    ),
}
