"""Vision transformers: encoders that read images of several sizes in one pass."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from torch import Tensor

from spear_lightning.models.encoders.base import VisionEncoder


class VisionTransformer(VisionEncoder):
    """Base of encoders whose blocks run once for images of all sizes (see `image_row`)."""

    @abstractmethod
    def encode_pixels(self, pixels: Sequence[Tensor]) -> list[Tensor]:
        """Do what `encode` does for normalised pixels (X, 3, H, W) of each size."""

    def encode(self, pixels_B3HW: Tensor) -> Tensor:
        """Return the patch tokens (B, N, width) of normalised pixels of one size."""
        return self.encode_pixels([pixels_B3HW])[0]

    def encode_images(self, images: Sequence[Tensor]) -> list[Tensor]:
        """Encode images of all sizes in one pass (see `VisionEncoder.encode_images`)."""
        return self.encode_pixels([self.normalized(part) for part in images])
