"""MoGe v1: the decoder of `Ruicheng/moge-vitl`, on the transformer that SPEAR-VLM reads.

Legend: B images, C channels, H and W the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spear_lightning.models.encoders.moge import MogeEncoder
from spear_lightning.models.moge.base import PATCH, Moge, MogeDecoder, MogeOutput, remapped
from spear_lightning.models.moge.blocks import ResidualBlock, convolution, precisely, upsampler, with_view_plane
from spear_lightning.models.moge.camera import resized

OUTPUTS = (3, 1)
"""Channels of the two output branches: points and mask."""


class MogeV1Head(nn.Module):
    """MoGe v1's decoder: layers summed, three times doubled, then a branch for points and one for the mask.

    Args:
        width: Channels of the transformer.
        layers: Layers of it that are read.
        projection: Channels that each is projected to.
        upsampled: Channels after each doubling.
        blocks: Residual blocks after each doubling.
        hidden_ratio: Channels inside a residual block, relative to those outside.
        last: Channels of the output branches.
    """

    def __init__(
        self,
        width: int,
        layers: int,
        projection: int,
        upsampled: Sequence[int],
        blocks: int,
        hidden_ratio: int,
        last: int,
    ) -> None:
        super().__init__()
        self.projects = nn.ModuleList(nn.Conv2d(width, projection, kernel_size=1) for _ in range(layers))
        self.upsample_blocks = nn.ModuleList(
            nn.Sequential(
                upsampler(below + 2, here),
                *(ResidualBlock(here, hidden_ratio * here, norms=True) for _ in range(blocks)),
            )
            for below, here in zip([projection, *upsampled[:-1]], upsampled, strict=True)
        )
        self.output_block = nn.ModuleList(
            nn.Sequential(
                convolution(upsampled[-1] + 2, last), nn.ReLU(), nn.Conv2d(last, channels, kernel_size=1)
            )
            for channels in OUTPUTS
        )

    def forward(self, maps: Sequence[Tensor], height: int, width: int) -> list[Tensor]:
        """Return raw points (B, 3, height, width) and raw mask (B, 1, height, width).

        Args:
            maps: (B, C, h, w), one of each layer.
            height: Rows of the output, about 14 h.
            width: Columns of the output, about 14 w.
        """
        aspect = width / height
        projected = [project(layer) for project, layer in zip(self.projects, maps, strict=True)]
        x = torch.stack(projected).sum(0)
        for block in self.upsample_blocks:
            x = block(with_view_plane(x, aspect))
        x = with_view_plane(resized(x, height, width), aspect)
        return [precisely(branch, x) for branch in self.output_block]


class MogeV1(Moge):
    """MoGe v1: point maps without scale. The defaults are ViT-L and the published weights' sizes.

    Args:
        encoder: The transformer; default: `MogeEncoder()`, ViT-L reading its last four blocks.
        projection: Channels that each of its layers is projected to.
        upsampled: Channels of the decoder at 2, 4 and 8 times the token grid.
        blocks: Residual blocks at each of these.
        hidden_ratio: Channels inside a residual block, relative to those outside.
        last: Channels of the two output branches, at full resolution.
        num_tokens_range: Fewest and most tokens of an image; published weights bring their own.
        detail: How many tokens an image gets, from 0 (fewest) to 9 (most).
        weights: `Ruicheng/moge-vitl`, a folder or a file, published or ours; `None` keeps the random ones.
    """

    backbone_prefix = "backbone."
    constants_prefix = ""

    def __init__(
        self,
        encoder: MogeEncoder | None = None,
        projection: int = 512,
        upsampled: tuple[int, ...] = (256, 128, 64),
        blocks: int = 2,
        hidden_ratio: int = 2,
        last: int = 32,
        num_tokens_range: tuple[int, int] = (1200, 2500),
        detail: int = 9,
        weights: str | None = None,
    ) -> None:
        encoder = MogeEncoder() if encoder is None else encoder
        super().__init__(encoder, num_tokens_range, detail, weights)
        hidden, layers = int(encoder.model.config.hidden_size), len(encoder.layers)
        head = MogeV1Head(hidden, layers, projection, upsampled, blocks, hidden_ratio, last)
        self.parts = MogeDecoder({"head": head})

    @property
    def decoder(self) -> MogeDecoder:
        """The head, under its published name."""
        return self.parts

    @property
    def metric(self) -> bool:
        """False: lengths are known up to a factor."""
        return False

    def predict(self, images_B3HW: Tensor, num_tokens: int) -> MogeOutput:
        """Return points and mask of float images in [0, 1]."""
        height, width = images_B3HW.shape[2:]
        factor = (num_tokens * PATCH**2 / (height * width)) ** 0.5
        inner = (max(int(height * factor), PATCH), max(int(width * factor), PATCH))
        pixels = images_B3HW
        if inner != (height, width):
            pixels = F.interpolate(pixels, inner, mode="bicubic", align_corners=False, antialias=True)
        whole = (inner[0] // PATCH * PATCH, inner[1] // PATCH * PATCH)
        if whole != inner:
            pixels = F.interpolate(pixels, whole, mode="bilinear", align_corners=False, antialias=True)
        maps, _ = self.features(pixels)
        points, mask = (resized(map_BCHW.float(), height, width) for map_BCHW in self.parts["head"](maps, *inner))
        return MogeOutput(remapped(points), mask[:, 0])

    def mask_values(self, mask_BHW: Tensor) -> Tensor:
        """Return the mask as it is: v1 was trained to give 0 or 1."""
        return mask_BHW

    def mask_loss(self, mask_BHW: Tensor, known_BHW: Tensor) -> Tensor:
        """Return the mean squared error."""
        return F.mse_loss(mask_BHW.float(), known_BHW.float())

    def published_config(self) -> dict[str, Any]:
        """Return the layers, as v1 names them where they are the last ones."""
        layers, depth = self.encoder.layers, self.encoder.depth
        last = layers == tuple(range(depth - len(layers), depth))
        return {"encoder": "dinov2", "intermediate_layers": len(layers) if last else list(layers)}
