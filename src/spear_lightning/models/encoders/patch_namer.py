"""An encoder with a head that says what each patch shows: how an encoder learns names before a VLM reads it."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from spear_lightning.errors import ConfigError
from spear_lightning.models.encoders.base import VisionEncoder
from spear_lightning.models.encoders.moge import MogeEncoder
from spear_lightning.models.encoders.weight_files import write_weights


class PatchNamer(nn.Module):
    """A vision encoder and a linear classifier of its tokens.

    Args:
        encoder: The encoder.
        names: Names that can be told apart; nothing is one more class.
    """

    def __init__(self, encoder: VisionEncoder, names: int = 256) -> None:
        super().__init__()
        if names < 1:
            raise ConfigError(
                "There are no names to tell apart", where="namer.names", found=names, expected=">= 1"
            )
        if isinstance(encoder, MogeEncoder):
            raise ConfigError(
                "MoGe's encoder cannot learn names: its files are those of whole MoGe models",
                where="namer.encoder",
                found=type(encoder).__name__,
                expected="a ConvolutionalEncoder, SiglipEncoder or Dinov2Encoder",
            )
        self.names = names
        self.encoder = encoder
        self.head = nn.Linear(encoder.width, 1 + names)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, N, 1 + names) of images, uint8 RGB (B, 3, H, W); class 0 is nothing."""
        return self.head(self.encoder(images))

    def save_encoder(self, path: str | Path) -> Path:
        """Write the encoder's weights, whole or not at all, for its `weights`.

        Args:
            path: A file name that ends in .safetensors.

        Returns:
            The file.
        """
        return write_weights(path, self.encoder.state_dict())
