"""A small encoder for training from random weights: convolutions first, then a few transformer blocks.

Where no pretrained weights are to be had, a plain vision transformer needs far more images to learn where things
are than convolutions do (Xiao et al. 2021, "Early Convolutions Help Transformers See Better"). This one has the
same interface and token grid as SigLIP and MoGe, so it stands in for either on small data.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from spear_lightning.errors import ConfigError
from spear_lightning.models.encoders.base import VisionEncoder
from spear_lightning.models.encoders.weight_files import load_exactly, read_state_dict

_STRIDE = 2
_FREQUENCIES = 8


class ConvolutionalEncoder(VisionEncoder):
    """Convolutions at half resolution, one token per 14 x 14 pixels, transformer blocks, LayerNorm.

    Positions are features of the relative place in the image, so images may have any size.

    Args:
        width: Channels of a token.
        channels: Channels of the convolutions at half resolution.
        stem_blocks: Residual blocks of two 3 x 3 convolutions each.
        depth: Transformer blocks.
        heads: Attention heads.
        mlp_width: Channels inside the MLP.
        weights: A file or folder that `PatchNamingModule` wrote (there are no published weights); `None` keeps the
            random ones.
    """

    def __init__(
        self,
        width: int = 384,
        channels: int = 64,
        stem_blocks: int = 2,
        depth: int = 4,
        heads: int = 6,
        mlp_width: int = 1536,
        weights: str | None = None,
    ) -> None:
        super().__init__(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), weights=weights)
        if min(channels, heads, width) < 1 or width % heads:
            raise ConfigError(
                "The encoder's width does not divide into heads",
                where="ConvolutionalEncoder",
                found=f"width {width}, heads {heads}",
            )
        self._width = width
        patch = self.patch_size // _STRIDE
        self.stem = nn.Sequential(
            nn.Conv2d(3, channels, kernel_size=2 * _STRIDE, stride=_STRIDE, padding=_STRIDE // 2),
            *(ResidualBlock(channels) for _ in range(stem_blocks)),
        )
        self.patchify = nn.Conv2d(channels, width, kernel_size=patch, stride=patch)
        self.position = nn.Linear(4 * _FREQUENCIES, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, heads, mlp_width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)

    @property
    def width(self) -> int:
        """Channels of an output token."""
        return self._width

    def encode(self, pixels_B3HW: Tensor) -> Tensor:
        """Return tokens (B, N, width) after the final LayerNorm."""
        grid_BDhw = self.patchify(self.stem(pixels_B3HW))
        features_NF = place_features(grid_BDhw.shape[2], grid_BDhw.shape[3], pixels_B3HW.device)
        tokens_BND = grid_BDhw.flatten(2).transpose(1, 2)
        tokens_BND = tokens_BND + self.position(features_NF.to(tokens_BND.dtype))
        for block in self.blocks:
            tokens_BND = block(tokens_BND)
        return self.norm(tokens_BND)

    def load_pretrained(self) -> None:
        """Load `weights`; see `VisionEncoder.load_pretrained`."""
        if self.weights is not None:
            state, where = read_state_dict(self.weights, ("model.safetensors",))
            load_exactly(self, state, where)


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions, each after GroupNorm and GELU; starts as the identity.

    Args:
        channels: In and out.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        groups = _groups(channels)
        self.layers = nn.Sequential(
            nn.GroupNorm(groups, channels),
            nn.GELU(),
            nn.Conv2d(channels, channels, kernel_size=3, padding=1),
            nn.GroupNorm(groups, channels),
            nn.GELU(),
            nn.Conv2d(channels, channels, kernel_size=3, padding=1),
        )
        last = self.layers[-1]
        for parameter in last.parameters():
            nn.init.zeros_(parameter)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Return the image (B, C, H, W) with the block's change added."""
        return image_BCHW + self.layers(image_BCHW)


def _groups(channels: int) -> int:
    return math.gcd(channels, 8)


def place_features(rows: int, columns: int, device: torch.device | None = None) -> Tensor:
    """Return sines and cosines of each token's relative place, float32 (rows * columns, 32).

    Args:
        rows: Of the token grid.
        columns: Of the token grid.
        device: Where to make them.
    """
    frequency_F = math.pi * 2.0 ** torch.arange(_FREQUENCIES, device=device) / 2
    phases = [
        ((torch.arange(count, device=device) + 0.5) / count)[:, None] * frequency_F for count in (rows, columns)
    ]
    waves = [torch.cat([phase.sin(), phase.cos()], dim=-1) for phase in phases]
    row_RCF = waves[0][:, None].expand(rows, columns, -1)
    column_RCF = waves[1][None].expand(rows, columns, -1)
    return torch.cat([row_RCF, column_RCF], dim=-1).flatten(0, 1)
