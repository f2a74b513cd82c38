"""The one interface of vision encoders: uint8 pixels in, patch tokens out (spec section 3)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from spear_lightning.errors import ConfigError, ShapeError


class VisionEncoder(nn.Module, ABC):
    """Base of vision encoders.

    Pixels stay uint8 until here: scaling, mean and standard deviation are applied on the device, in float32.

    Args:
        mean: Mean of each RGB channel, for pixels in [0, 1].
        std: Standard deviation of each RGB channel, likewise.
        weights: Where pretrained weights are: a hub id, a folder or a file; `None` keeps the random ones.
        patch_size: Side of a square patch in pixels.
    """

    def __init__(
        self,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        weights: str | None = None,
        patch_size: int = 14,
    ) -> None:
        super().__init__()
        # Plain numbers, not buffers: a model cast to bfloat16 must not round them.
        self.mean = mean
        self.std = std
        self.weights = weights
        self.patch_size = patch_size

    @property
    @abstractmethod
    def width(self) -> int:
        """Channels of an output token."""

    @abstractmethod
    def encode(self, pixels_B3HW: Tensor) -> Tensor:
        """Return the patch tokens (B, N, width) of normalised float pixels (B, 3, H, W), row by row."""

    @abstractmethod
    def load_pretrained(self) -> None:
        """Load the weights that `weights` names; does nothing when it is `None`.

        Raises:
            CheckpointError: If the weights cannot be read or belong to another architecture.
        """

    def unused_parameters(self) -> list[str]:
        """Names, relative to the encoder, of parameters that its output does not depend on."""
        return []

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Return rows and columns of the token grid of an image.

        Args:
            height: Pixels.
            width: Pixels.

        Raises:
            ConfigError: If a side is not a positive multiple of the patch size.
        """
        patch = self.patch_size
        if min(height, width) < patch or height % patch or width % patch:
            nearest = [max(patch, round(side / patch) * patch) for side in (height, width)]
            raise ConfigError(
                "The image does not divide into patches",
                where=f"images of {type(self).__name__}",
                found=f"{height} pixels high, {width} wide",
                expected=f"multiples of {patch}; the nearest are {nearest[0]} and {nearest[1]}",
                remedy="set the camera's height and width in the data's configuration",
            )
        return height // patch, width // patch

    def forward(self, images_B3HW: Tensor) -> Tensor:
        """Encode images of one size.

        Args:
            images_B3HW: uint8 RGB (B, 3, H, W); H and W multiples of the patch size.

        Returns:
            Patch tokens (B, N, width), N = (H / patch_size)(W / patch_size), row by row from the top left.

        Raises:
            ShapeError: If the images are not uint8 (B, 3, H, W).
            ConfigError: If H or W is not a multiple of the patch size.
        """
        return self.encode(self.normalized(images_B3HW))

    def encode_images(self, images: Sequence[Tensor]) -> list[Tensor]:
        """Encode images of several sizes.

        Args:
            images: For each size a batch as `forward` takes it; at least one.

        Returns:
            What `forward` returns for each of them. Encoders for which it is less work do all of it in one pass.
        """
        return [self(part) for part in images]

    def normalized(self, images_B3HW: Tensor) -> Tensor:
        """Return the pixels of images (see `forward`) with mean 0 and deviation 1, in the parameters' type."""
        if images_B3HW.dtype != torch.uint8 or images_B3HW.ndim != 4 or images_B3HW.shape[1] != 3:
            raise ShapeError(
                "An encoder reads uint8 RGB images",
                where=type(self).__name__,
                found=f"{images_B3HW.dtype} {tuple(images_B3HW.shape)}",
                expected="torch.uint8 (B, 3, H, W)",
            )
        self.grid(images_B3HW.shape[2], images_B3HW.shape[3])
        channels = [
            (images_B3HW[:, index].float() - 255 * mean) / (255 * std)
            for index, (mean, std) in enumerate(zip(self.mean, self.std, strict=True))
        ]
        dtype = next(self.parameters()).dtype
        return torch.stack(channels, dim=1).to(dtype)
