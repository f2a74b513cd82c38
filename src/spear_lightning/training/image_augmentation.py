"""Augmentation of camera images on the device, for training alone.

Shape letters: B samples, H rows, W columns.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from spear_lightning.batches import RobotBatch
from spear_lightning.errors import ConfigError
from spear_lightning.training.augmentation import Augmentation

_LUMA = (0.299, 0.587, 0.114)


class ImageAugmentation(Augmentation):
    """Random crop, brightness, contrast and saturation, drawn for each sample and camera.

    A crop keeps the aspect ratio and is resized back, so images are never stretched; it changes the apparent focal
    length by at most the crop's share. The ranges are those of Octo and OpenVLA, but for a smaller crop.

    Args:
        crop: Smallest side of the crop relative to the image, in (0, 1]; 1 leaves geometry alone.
        brightness: Largest shift, of full scale.
        contrast: Largest relative change of the distance from the image's mean.
        saturation: Largest relative change of the distance from grey.
    """

    def __init__(
        self, crop: float = 0.95, brightness: float = 0.2, contrast: float = 0.2, saturation: float = 0.2
    ) -> None:
        if not 0 < crop <= 1 or min(brightness, contrast, saturation) < 0 or max(contrast, saturation) >= 1:
            raise ConfigError(
                "These augmentations cannot be drawn",
                where="model.augmentation",
                found={"crop": crop, "brightness": brightness, "contrast": contrast, "saturation": saturation},
                expected="crop in (0, 1], brightness >= 0, contrast and saturation in [0, 1)",
            )
        self.crop, self.brightness, self.contrast, self.saturation = crop, brightness, contrast, saturation

    def __call__(self, batch: RobotBatch, generator: torch.Generator) -> RobotBatch:
        """Change the images (see `Augmentation`)."""
        return batch.with_images({name: self.images(pixels, generator) for name, pixels in batch.images.items()})

    def images(self, pixels_B3HW: Tensor, generator: torch.Generator) -> Tensor:
        """Return changed images, uint8 (B, 3, H, W)."""
        drawn_6B = 2 * torch.rand(6, len(pixels_B3HW), generator=generator, device=pixels_B3HW.device) - 1
        image_B3HW = pixels_B3HW.float()
        if self.crop < 1:
            image_B3HW = _cropped(image_B3HW, 1 - (1 - self.crop) * drawn_6B[0].abs(), drawn_6B[1:3])
        brightness, contrast, saturation = drawn_6B[3:, :, None, None, None]
        # Numbers, not a tensor of them: that would be copied to the GPU, which the process would wait for.
        red, green, blue = image_B3HW.split(1, dim=1)
        luma_B1HW = _LUMA[0] * red + _LUMA[1] * green + _LUMA[2] * blue
        image_B3HW = torch.lerp(image_B3HW, luma_B1HW, self.saturation * saturation)
        mean_B111 = luma_B1HW.mean((1, 2, 3), keepdim=True)
        image_B3HW = torch.lerp(image_B3HW, mean_B111, self.contrast * contrast)
        image_B3HW = image_B3HW + 255 * self.brightness * brightness
        return image_B3HW.round().clamp(0, 255).to(torch.uint8)


def require_no_crop(augmentation: ImageAugmentation | None, why: str) -> None:
    """Check that an augmentation changes colours alone.

    Args:
        augmentation: The augmentation, if there is one.
        why: What a crop would do.

    Raises:
        ConfigError: If it crops.
    """
    if augmentation is not None and augmentation.crop != 1:
        raise ConfigError(why, where="model.augmentation.crop", found=augmentation.crop, expected=1)


def _cropped(image_B3HW: Tensor, side_B: Tensor, place_2B: Tensor) -> Tensor:
    """Cut out a part of relative size `side_B`, `place_2B` in [-1, 1] of where it can be; resize it back."""
    theta_B23 = image_B3HW.new_zeros(len(side_B), 2, 3)
    theta_B23[:, 0, 0] = theta_B23[:, 1, 1] = side_B
    theta_B23[:, :, 2] = (place_2B * (1 - side_B)).T
    grid = F.affine_grid(theta_B23, list(image_B3HW.shape), align_corners=False)
    return F.grid_sample(image_B3HW, grid, mode="bilinear", padding_mode="border", align_corners=False)
