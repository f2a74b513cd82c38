"""The networks: vision encoders, SPEAR-VLM, the action expert and SPEAR-1, in plain torch."""

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
from spear_lightning.models.gemma_shape import GemmaShape
from spear_lightning.models.moge import MogeV1, MogeV2
from spear_lightning.models.prompt import PromptTokenizer
from spear_lightning.models.spear_vla import Prefix, SpearVLA
from spear_lightning.models.spear_vlm import SpearVLM

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
    "Prefix",
    "PromptTokenizer",
    "SiglipEncoder",
    "SpearVLA",
    "SpearVLM",
    "VisionEncoder",
]
