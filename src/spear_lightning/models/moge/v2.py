"""MoGe-2: point maps in metres, on a pyramid of convolutions (`Ruicheng/moge-2-vitl`, `...-vitl-normal`).

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
from spear_lightning.models.moge.blocks import LEVELS, ConvStack, view_plane
from spear_lightning.models.moge.camera import resized

LAYERS_V2 = (5, 11, 17, 23)
"""Blocks that the published decoder reads."""


class MogeV2Encoding(nn.Module):
    """The projections of the transformer's layers, summed, under their published name.

    Args:
        width: Channels of the transformer.
        layers: Layers that are read.
        output: Channels of the sum.
    """

    def __init__(self, width: int, layers: int, output: int) -> None:
        super().__init__()
        self.output_projections = nn.ModuleList(nn.Conv2d(width, output, kernel_size=1) for _ in range(layers))

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Return the sum (B, output, h, w) of the projected layers."""
        projected = [project(layer) for project, layer in zip(self.output_projections, maps, strict=True)]
        return torch.stack(projected).sum(0)


class MogeV2(Moge):
    """MoGe-2: point maps with a metric scale. The defaults are ViT-L and the published weights' sizes.

    Args:
        encoder: The transformer; default: ViT-L reading blocks 5, 11, 17 and 23.
        widths: Channels at 1, 2, 4, 8 and 16 times the token grid.
        neck_blocks: Residual blocks of the shared neck at each of these.
        head_blocks: Residual blocks of each head at each of these.
        scale_hidden: Channels of the two hidden layers that find the metric scale.
        normals: Whether there is a head for surface normals (weights whose name ends in `-normal`).
        num_tokens_range: Fewest and most tokens of an image; published weights bring their own.
        detail: How many tokens an image gets, from 0 (fewest) to 9 (most).
        weights: A hub id, a folder or a file, published or ours; `None` keeps the random ones.
    """

    backbone_prefix = "encoder.backbone."
    constants_prefix = "encoder."

    def __init__(
        self,
        encoder: MogeEncoder | None = None,
        widths: tuple[int, int, int, int, int] = (1024, 256, 128, 64, 32),
        neck_blocks: tuple[int, int, int, int, int] = (0, 2, 2, 2, 0),
        head_blocks: tuple[int, int, int, int, int] = (0, 1, 1, 1, 0),
        scale_hidden: int = 1024,
        normals: bool = True,
        num_tokens_range: tuple[int, int] = (1200, 3600),
        detail: int = 9,
        weights: str | None = None,
    ) -> None:
        encoder = MogeEncoder(layers=LAYERS_V2) if encoder is None else encoder
        super().__init__(encoder, num_tokens_range, detail, weights)
        hidden = int(encoder.model.config.hidden_size)
        outputs = {"points_head": 3, "mask_head": 1, **({"normal_head": 3} if normals else {})}
        self.parts = MogeDecoder(
            {
                "encoder": MogeV2Encoding(hidden, len(encoder.layers), widths[0]),
                "neck": ConvStack((widths[0] + 2, *[2] * (LEVELS - 1)), widths, neck_blocks),
                **{name: ConvStack(widths, widths, head_blocks, channels) for name, channels in outputs.items()},
                "scale_head": nn.Sequential(
                    nn.Linear(hidden, scale_hidden),
                    nn.ReLU(),
                    nn.Linear(scale_hidden, scale_hidden),
                    nn.ReLU(),
                    nn.Linear(scale_hidden, 1),
                ),
            }
        )

    @property
    def decoder(self) -> MogeDecoder:
        """Projections, neck and heads, under their published names."""
        return self.parts

    @property
    def metric(self) -> bool:
        """True: lengths are metres."""
        return True

    def predict(self, images_B3HW: Tensor, num_tokens: int) -> MogeOutput:
        """Return points, mask, scale and normals of float images in [0, 1]."""
        height, width = images_B3HW.shape[2:]
        aspect = width / height
        rows = max(round((num_tokens / aspect) ** 0.5), 1)
        columns = max(round((num_tokens * aspect) ** 0.5), 1)
        pixels, whole = images_B3HW, (rows * PATCH, columns * PATCH)
        if whole != (height, width):
            pixels = F.interpolate(pixels, whole, mode="bilinear", align_corners=False, antialias=True)
        layers, class_BD = self.features(pixels)
        x = self.parts["encoder"](layers)
        planes = [
            view_plane(rows << level, columns << level, aspect, x).expand(len(x), -1, -1, -1)
            for level in range(LEVELS)
        ]
        maps = self.parts["neck"]([torch.cat([x, planes[0]], dim=1), *planes[1:]])
        found = {
            name: resized(self.parts[name](maps)[-1].float(), height, width)
            for name in ("points_head", "mask_head", "normal_head")
            if name in self.parts
        }
        normals = found.get("normal_head")
        return MogeOutput(
            points=remapped(found["points_head"]),
            mask=found["mask_head"][:, 0],
            scale=self.parts["scale_head"](class_BD)[:, 0].float().exp(),
            normals=None if normals is None else F.normalize(normals.movedim(1, -1), dim=-1),
        )

    def mask_values(self, mask_BHW: Tensor) -> Tensor:
        """Return the sigmoid of the mask."""
        return mask_BHW.sigmoid()

    def mask_loss(self, mask_BHW: Tensor, known_BHW: Tensor) -> Tensor:
        """Return the binary cross entropy."""
        return F.binary_cross_entropy_with_logits(mask_BHW.float(), known_BHW.float())

    def published_config(self) -> dict[str, Any]:
        """Return the layers, where v2 keeps them."""
        return {"encoder": {"backbone": "dinov2", "intermediate_layers": list(self.encoder.layers)}}
