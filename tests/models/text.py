"""Text models of transformers: causal, masked, and encoder-decoder."""

from __future__ import annotations

from .example import BART, BERT, GPT, LLAMA, T5, TOKENS, masked, pair, text, transformers_model

__all__ = ["CAUSAL", "ENCODER_DECODER", "MASKED"]

_WIDE = LLAMA | {"head_dim": 8}
_EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
_DEEPSEEK = _WIDE | {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "num_key_value_heads": 4,
}

CAUSAL = {
    "bigcode": transformers_model("GPTBigCodeForCausalLM", text, **GPT),
    "biogpt": transformers_model("BioGptForCausalLM", text, **BERT, layerdrop=0.0),
    "bloom": transformers_model(
        "BloomForCausalLM", text, **TOKENS, hidden_size=32, n_layer=2, n_head=4
    ),
    "codegen": transformers_model("CodeGenForCausalLM", text, **GPT, rotary_dim=4),
    "cohere": transformers_model("CohereForCausalLM", text, **LLAMA),
    "ctrl": transformers_model("CTRLLMHeadModel", text, **GPT, dff=64),
    "deepseek_v2": transformers_model("DeepseekV2ForCausalLM", text, **_DEEPSEEK),
    "deepseek_v3": transformers_model("DeepseekV3ForCausalLM", text, **_DEEPSEEK),
    "falcon": transformers_model(
        "FalconForCausalLM",
        text,
        **TOKENS,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
    ),
    "gemma": transformers_model("GemmaForCausalLM", text, **_WIDE),
    "gemma2": transformers_model("Gemma2ForCausalLM", text, **_WIDE, sliding_window=8),
    "glm": transformers_model("GlmForCausalLM", text, **_WIDE),
    "gpt2": transformers_model("GPT2LMHeadModel", text, **GPT),
    "gpt_neo": transformers_model(
        "GPTNeoForCausalLM",
        text,
        **TOKENS,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        max_position_embeddings=32,
    ),
    "gpt_neox": transformers_model("GPTNeoXForCausalLM", text, **BERT),
    "gptj": transformers_model("GPTJForCausalLM", text, **GPT, rotary_dim=4),
    "granite": transformers_model("GraniteForCausalLM", text, **LLAMA),
    "helium": transformers_model("HeliumForCausalLM", text, **_WIDE),
    "llama": transformers_model("LlamaForCausalLM", text, **LLAMA),
    "mamba": transformers_model(
        "MambaForCausalLM", text, **TOKENS, hidden_size=32, state_size=4, num_hidden_layers=2
    ),
    "mistral": transformers_model("MistralForCausalLM", text, **LLAMA, sliding_window=8),
    "mixtral": transformers_model("MixtralForCausalLM", text, **LLAMA, **_EXPERTS),
    "mpt": transformers_model(
        "MptForCausalLM", text, **TOKENS, d_model=32, n_heads=4, n_layers=2, max_seq_len=32
    ),
    "nemotron": transformers_model("NemotronForCausalLM", text, **_WIDE),
    "olmo": transformers_model("OlmoForCausalLM", text, **LLAMA),
    "olmo2": transformers_model("Olmo2ForCausalLM", text, **LLAMA),
    "openai_gpt": transformers_model("OpenAIGPTLMHeadModel", text, **GPT),
    "opt": transformers_model(
        "OPTForCausalLM", text, **BERT, ffn_dim=64, word_embed_proj_dim=32, layerdrop=0.0
    ),
    "persimmon": transformers_model("PersimmonForCausalLM", text, **BERT),
    "phi": transformers_model("PhiForCausalLM", text, **LLAMA),
    "phi3": transformers_model("Phi3ForCausalLM", text, **LLAMA),
    "qwen2": transformers_model("Qwen2ForCausalLM", text, **LLAMA),
    "qwen2_moe": transformers_model("Qwen2MoeForCausalLM", text, **LLAMA, **_EXPERTS),
    "qwen3": transformers_model("Qwen3ForCausalLM", text, **_WIDE),
    "qwen3_moe": transformers_model("Qwen3MoeForCausalLM", text, **_WIDE, **_EXPERTS),
    "smollm3": transformers_model("SmolLM3ForCausalLM", text, **LLAMA),
    "stablelm": transformers_model("StableLmForCausalLM", text, **LLAMA),
    "starcoder2": transformers_model("Starcoder2ForCausalLM", text, **LLAMA),
    "xglm": transformers_model(
        "XGLMForCausalLM",
        text,
        **TOKENS,
        d_model=32,
        ffn_dim=64,
        num_layers=2,
        attention_heads=4,
        max_position_embeddings=32,
        layerdrop=0.0,
    ),
}

MASKED = {
    "albert": transformers_model("AlbertForMaskedLM", masked, **BERT, embedding_size=16),
    "bert": transformers_model("BertForMaskedLM", masked, **BERT),
    "camembert": transformers_model("CamembertForMaskedLM", masked, **BERT),
    "convbert": transformers_model("ConvBertForMaskedLM", masked, **BERT, embedding_size=32),
    "deberta": transformers_model(
        "DebertaForMaskedLM", masked, **BERT, relative_attention=True, pos_att_type=["c2p", "p2c"]
    ),
    "deberta_v2": transformers_model(
        "DebertaV2ForMaskedLM", masked, **BERT, relative_attention=True, pos_att_type=["c2p", "p2c"]
    ),
    "distilbert": transformers_model(
        "DistilBertForMaskedLM",
        masked,
        **TOKENS,
        dim=32,
        hidden_dim=64,
        n_layers=2,
        n_heads=4,
        max_position_embeddings=32,
    ),
    "electra": transformers_model("ElectraForMaskedLM", masked, **BERT, embedding_size=16),
    "ernie": transformers_model("ErnieForMaskedLM", masked, **BERT),
    "esm": transformers_model(
        "EsmForMaskedLM", masked, **BERT, mask_token_id=3, position_embedding_type="rotary"
    ),
    "fnet": transformers_model("FNetForMaskedLM", text, **BERT),
    "funnel": transformers_model(
        "FunnelForMaskedLM",
        masked,
        **TOKENS,
        d_model=32,
        n_head=4,
        d_head=8,
        d_inner=64,
        block_sizes=[1, 1],
        num_decoder_layers=1,
    ),
    "ibert": transformers_model("IBertForMaskedLM", masked, **BERT),
    "layoutlm": transformers_model("LayoutLMForMaskedLM", masked, **BERT),
    "megatron_bert": transformers_model("MegatronBertForMaskedLM", masked, **BERT),
    "mobilebert": transformers_model(
        "MobileBertForMaskedLM",
        masked,
        **BERT,
        embedding_size=16,
        intra_bottleneck_size=16,
        true_hidden_size=16,
    ),
    "modernbert": transformers_model(
        "ModernBertForMaskedLM", masked, **BERT, cls_token_id=1, sep_token_id=2
    ),
    "mpnet": transformers_model("MPNetForMaskedLM", masked, **BERT),
    "nystromformer": transformers_model(
        "NystromformerForMaskedLM", text, **BERT, segment_means_seq_len=12, num_landmarks=4
    ),
    "roberta": transformers_model("RobertaForMaskedLM", masked, **BERT),
    "roformer": transformers_model("RoFormerForMaskedLM", masked, **BERT, embedding_size=32),
    "squeezebert": transformers_model("SqueezeBertForMaskedLM", masked, **BERT, embedding_size=32),
    "xlm_roberta": transformers_model("XLMRobertaForMaskedLM", masked, **BERT),
    "xlnet": transformers_model(
        "XLNetLMHeadModel", text, **TOKENS, d_model=32, n_layer=2, n_head=4, d_inner=64
    ),
}

ENCODER_DECODER = {
    "bart": transformers_model("BartForConditionalGeneration", pair, **BART),
    "blenderbot": transformers_model("BlenderbotForConditionalGeneration", pair, **BART),
    "m2m_100": transformers_model("M2M100ForConditionalGeneration", pair, **BART),
    "marian": transformers_model("MarianMTModel", pair, **BART),
    "mbart": transformers_model("MBartForConditionalGeneration", pair, **BART),
    "mt5": transformers_model("MT5ForConditionalGeneration", pair, **T5),
    "pegasus": transformers_model("PegasusForConditionalGeneration", pair, **BART),
    "plbart": transformers_model("PLBartForConditionalGeneration", pair, **BART),
    "prophetnet": transformers_model(
        "ProphetNetForConditionalGeneration",
        pair,
        **TOKENS,
        hidden_size=32,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        num_encoder_layers=2,
        num_decoder_layers=2,
        num_encoder_attention_heads=4,
        num_decoder_attention_heads=4,
        max_position_embeddings=32,
        decoder_start_token_id=1,
    ),
    "t5": transformers_model("T5ForConditionalGeneration", pair, **T5),
    "umt5": transformers_model("UMT5ForConditionalGeneration", pair, **T5),
}
