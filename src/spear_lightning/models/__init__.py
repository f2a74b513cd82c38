"""The networks: vision encoders, SPEAR-VLM, the action expert and SPEAR-1, in plain torch.

Classes are imported when they are first asked for: processes that read data need the tokenizer alone, and
transformers takes seconds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from spear_lightning.late_imports import late_imports

if TYPE_CHECKING:
    from spear_lightning.models.action_expert import ActionExpert
    from spear_lightning.models.encoders import (
        ConvolutionalEncoder,
        Dinov2Encoder,
        Fusion,
        MeanFusion,
        MogeEncoder,
        SiglipEncoder,
        VisionEncoder,
    )
    from spear_lightning.models.encoders.patch_namer import PatchNamer
    from spear_lightning.models.gemma_shape import GemmaShape
    from spear_lightning.models.moge import MogeV1, MogeV2
    from spear_lightning.models.prompt import PromptTokenizer
    from spear_lightning.models.spear_vla import Prefix, SpearVLA
    from spear_lightning.models.spear_vlm import SpearVLM

_HOMES = {
    "ActionExpert": "action_expert",
    "ConvolutionalEncoder": "encoders",
    "Dinov2Encoder": "encoders",
    "Fusion": "encoders",
    "GemmaShape": "gemma_shape",
    "MeanFusion": "encoders",
    "MogeEncoder": "encoders",
    "MogeV1": "moge",
    "MogeV2": "moge",
    "PatchNamer": "encoders.patch_namer",
    "Prefix": "spear_vla",
    "PromptTokenizer": "prompt",
    "SiglipEncoder": "encoders",
    "SpearVLA": "spear_vla",
    "SpearVLM": "spear_vlm",
    "VisionEncoder": "encoders",
}

__all__ = [
    "ActionExpert",
    "ConvolutionalEncoder",
    "Dinov2Encoder",
    "Fusion",
    "GemmaShape",
    "MeanFusion",
    "MogeEncoder",
    "MogeV1",
    "MogeV2",
    "PatchNamer",
    "Prefix",
    "PromptTokenizer",
    "SiglipEncoder",
    "SpearVLA",
    "SpearVLM",
    "VisionEncoder",
]

__getattr__ = late_imports(__name__, _HOMES)


def __dir__() -> list[str]:
    return sorted(__all__)
