"""A small PaliGemma of transformers, whose weights our network must answer like."""

from __future__ import annotations

import torch
from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration

IMAGE_TOKEN = 299

GEMMA = {
    "model_type": "gemma",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "vocab_size": 300,
}

SIGLIP_CONFIG = {
    "model_type": "siglip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "vision_use_head": False,
}

SIGLIP = {"width": 16, "depth": 2, "heads": 2, "mlp_width": 24, "image_size": 28}
"""The same as arguments of our encoder."""


def paligemma(vocabulary: int = 300) -> PaliGemmaForConditionalGeneration:
    """Return the model with random weights, the same in every call."""
    config = PaliGemmaConfig(
        text_config={**GEMMA, "vocab_size": vocabulary},
        vision_config=SIGLIP_CONFIG,
        projection_dim=32,
        hidden_size=32,
        image_token_index=IMAGE_TOKEN,
    )
    torch.manual_seed(0)
    model = PaliGemmaForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        # Large enough for every part to matter, norms included.
        torch.nn.init.normal_(parameter, std=0.2)
    return model
