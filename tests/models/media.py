"""Vision, audio and multimodal models of transformers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .example import BART, BERT, BODY, CLIP, ROWS, VIT, VOCABULARY, ids, masked, transformers_model

__all__ = ["AUDIO", "MULTIMODAL", "VISION"]

Inputs = Callable[[], dict[str, Tensor]]


def _image(size: int = 32) -> Inputs:
    return lambda: {"pixel_values": torch.randn(ROWS, 3, size, size)}


def _wave(length: int = 1600) -> Inputs:
    return lambda: {"input_values": torch.randn(ROWS, length)}


def _mel(bins: int, frames: int) -> Inputs:
    return lambda: {"input_features": torch.randn(ROWS, bins, frames), "decoder_input_ids": ids(8)}


def _image_and_text(size: int = 32) -> Inputs:
    return lambda: {**masked(), "pixel_values": torch.randn(ROWS, 3, size, size)}


_STAGES = {"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1]}
_WAV = BODY | {
    "vocab_size": VOCABULARY,
    "conv_dim": (16, 16),
    "conv_kernel": (10, 4),
    "conv_stride": (5, 4),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
    "mask_time_prob": 0.0,
    "mask_feature_prob": 0.0,
    "layerdrop": 0.0,
}

VISION = {
    "beit": transformers_model("BeitForImageClassification", _image(), **VIT),
    "bit": transformers_model(
        "BitForImageClassification",
        _image(),
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[1, 1],
        num_groups=4,
    ),
    "convnext": transformers_model("ConvNextForImageClassification", _image(), **_STAGES),
    "convnext_v2": transformers_model("ConvNextV2ForImageClassification", _image(), **_STAGES),
    "data2vec_vision": transformers_model("Data2VecVisionForImageClassification", _image(), **VIT),
    "deit": transformers_model("DeiTForImageClassification", _image(), **VIT),
    "dinov2": transformers_model("Dinov2ForImageClassification", _image(), **VIT),
    "dpt": transformers_model(
        "DPTForSemanticSegmentation",
        _image(),
        **(VIT | {"num_hidden_layers": 4}),
        is_hybrid=False,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 8, 16, 16],
        fusion_hidden_size=16,
        use_auxiliary_head=False,
    ),
    "efficientnet": transformers_model(
        "EfficientNetForImageClassification",
        _image(),
        image_size=32,
        width_coefficient=0.25,
        depth_coefficient=0.3,
        hidden_dim=320,
    ),
    "focalnet": transformers_model(
        "FocalNetForImageClassification",
        _image(),
        image_size=32,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        hidden_sizes=[8, 16, 32, 64],
    ),
    "hiera": transformers_model(
        "HieraForImageClassification",
        _image(32),
        image_size=[32, 32],
        embed_dim=16,
        depths=[1, 1],
        num_heads=[1, 2],
        masked_unit_size=[2, 2],
        query_stride=[2, 2],
        num_query_pool=1,
    ),
    "levit": transformers_model(
        "LevitForImageClassification",
        _image(),
        image_size=32,
        hidden_sizes=[16, 16, 32],
        num_attention_heads=[2, 2, 4],
        depths=[1, 1, 1],
        key_dim=[8, 8, 8],
    ),
    "mobilenet_v1": transformers_model(
        "MobileNetV1ForImageClassification", _image(64), depth_multiplier=0.25
    ),
    "mobilenet_v2": transformers_model(
        "MobileNetV2ForImageClassification", _image(64), depth_multiplier=0.25
    ),
    "mobilevit": transformers_model(
        "MobileViTForImageClassification",
        _image(),
        image_size=32,
        hidden_sizes=[16, 16, 16],
        neck_hidden_sizes=[8, 8, 8, 8, 8, 8, 16],
        num_attention_heads=2,
    ),
    "poolformer": transformers_model("PoolFormerForImageClassification", _image(), **_STAGES),
    "pvt": transformers_model(
        "PvtForImageClassification",
        _image(),
        image_size=32,
        hidden_sizes=[8, 16, 16, 32],
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 2, 2, 4],
    ),
    "regnet": transformers_model(
        "RegNetForImageClassification",
        _image(),
        embedding_size=8,
        hidden_sizes=[8, 16, 16, 32],
        depths=[1, 1, 1, 1],
        groups_width=4,
    ),
    "resnet": transformers_model(
        "ResNetForImageClassification",
        _image(),
        embedding_size=8,
        hidden_sizes=[8, 16, 16, 32],
        depths=[1, 1, 1, 1],
    ),
    "segformer": transformers_model(
        "SegformerForSemanticSegmentation",
        _image(),
        hidden_sizes=[8, 16, 16, 32],
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 2, 2, 4],
        decoder_hidden_size=16,
    ),
    "swin": transformers_model(
        "SwinForImageClassification",
        _image(),
        image_size=32,
        patch_size=2,
        embed_dim=8,
        depths=[1, 1],
        num_heads=[2, 2],
        window_size=4,
    ),
    "swin_v2": transformers_model(
        "Swinv2ForImageClassification",
        _image(),
        image_size=32,
        patch_size=2,
        embed_dim=8,
        depths=[1, 1],
        num_heads=[2, 2],
        window_size=4,
    ),
    "vit": transformers_model(
        "ViTForImageClassification", _image(), **VIT, hidden_dropout_prob=0.1
    ),
    "vit_hybrid_mae": transformers_model("ViTMAEModel", _image(), **VIT, mask_ratio=0.5),
    "vit_msn": transformers_model("ViTMSNForImageClassification", _image(), **VIT),
    "yolos": transformers_model(
        "YolosForObjectDetection",
        _image(),
        **(VIT | {"image_size": [32, 32]}),
        num_detection_tokens=4,
    ),
}

AUDIO = {
    "ast": transformers_model(
        "ASTForAudioClassification",
        lambda: {"input_values": torch.randn(ROWS, 32, 16)},
        **BODY,
        max_length=32,
        num_mel_bins=16,
        patch_size=8,
        frequency_stride=8,
        time_stride=8,
    ),
    "data2vec_audio": transformers_model("Data2VecAudioForCTC", _wave(), **_WAV),
    "hubert": transformers_model("HubertForCTC", _wave(), **_WAV),
    "sew": transformers_model("SEWForCTC", _wave(), **_WAV, squeeze_factor=2),
    "speech_to_text": transformers_model(
        "Speech2TextForConditionalGeneration",
        lambda: {"input_features": torch.randn(ROWS, 32, 16), "decoder_input_ids": ids(8)},
        **BART,
        max_source_positions=64,
        max_target_positions=32,
        input_feat_per_channel=16,
        conv_channels=32,
    ),
    "unispeech": transformers_model("UniSpeechForCTC", _wave(), **_WAV),
    "wav2vec2": transformers_model("Wav2Vec2ForCTC", _wave(), **_WAV),
    "wavlm": transformers_model("WavLMForCTC", _wave(), **_WAV),
    "whisper": transformers_model(
        "WhisperForConditionalGeneration",
        _mel(16, 64),
        **BART,
        num_mel_bins=16,
        max_source_positions=32,
        max_target_positions=32,
    ),
}

MULTIMODAL = {
    "altclip": transformers_model(
        "AltCLIPModel",
        _image_and_text(),
        text_config=BERT | {"project_dim": 16},
        vision_config=VIT,
        projection_dim=16,
    ),
    "blip": transformers_model("BlipForConditionalGeneration", _image_and_text(), **CLIP),
    "chinese_clip": transformers_model("ChineseCLIPModel", _image_and_text(), **CLIP),
    "clip": transformers_model("CLIPModel", _image_and_text(), **CLIP),
    "clipseg": transformers_model("CLIPSegModel", _image_and_text(), **CLIP),
    "flava": transformers_model(
        "FlavaModel",
        _image_and_text(),
        text_config=BERT,
        image_config=VIT,
        multimodal_config=BODY,
        hidden_size=32,
        projection_dim=16,
    ),
    "git": transformers_model("GitForCausalLM", _image_and_text(), **BERT, vision_config=VIT),
    "groupvit": transformers_model(
        "GroupViTModel",
        _image_and_text(),
        text_config=BERT,
        vision_config=VIT
        | {"depths": [1, 1, 0], "num_group_tokens": [4, 2, 0], "num_output_groups": [4, 2, 0]},
        projection_dim=16,
        projection_intermediate_dim=32,
    ),
    "siglip": transformers_model(
        "SiglipModel",
        _image_and_text(),
        text_config=BERT | {"projection_size": 32},
        vision_config=VIT,
    ),
    "vilt": transformers_model(
        "ViltModel",
        lambda: {**masked(), "pixel_values": torch.randn(ROWS, 3, 32, 32)},
        **BERT,
        image_size=32,
        patch_size=8,
    ),
    "visual_bert": transformers_model(
        "VisualBertModel",
        lambda: {**masked(), "visual_embeds": torch.randn(ROWS, 4, 16)},
        **BERT,
        visual_embedding_dim=16,
    ),
}
