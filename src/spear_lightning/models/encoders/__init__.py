"""Vision encoders behind one interface, and the fusion of their tokens (spec section 3)."""

from spear_lightning.models.encoders.base import VisionEncoder
from spear_lightning.models.encoders.convolutional import ConvolutionalEncoder
from spear_lightning.models.encoders.dinov2 import Dinov2Encoder
from spear_lightning.models.encoders.fusion import Fusion, MeanFusion
from spear_lightning.models.encoders.moge import MogeEncoder
from spear_lightning.models.encoders.siglip import SiglipEncoder

__all__ = [
    "ConvolutionalEncoder",
    "Dinov2Encoder",
    "Fusion",
    "MeanFusion",
    "MogeEncoder",
    "SiglipEncoder",
    "VisionEncoder",
]
