"""Convolutional parts of MoGe's decoders (Wang et al. 2025, "MoGe"; the same, "MoGe-2").

Legend: B images, C channels, H and W the rows and columns of a map.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

GROUP = 32
"""Channels of a group in the inner GroupNorm of a residual block."""

LEVELS = 5
"""Levels of a `ConvStack`; each has twice the resolution of the one before."""


def view_plane(rows: int, columns: int, aspect: float, like: Tensor) -> Tensor:
    """Return where pixel centres lie on the view plane, in half diagonals of the image.

    Args:
        rows: Of the map.
        columns: Of the map.
        aspect: Width / height of the image (the map's own may differ by rounding).
        like: Gives type and device.

    Returns:
        (2, rows, columns): u to the right, v down, 0 in the middle; the image's corners have norm 1.
    """
    diagonal = math.hypot(1, aspect)
    u = torch.arange(columns, device=like.device, dtype=torch.float32) * 2 + (1 - columns)
    v = torch.arange(rows, device=like.device, dtype=torch.float32) * 2 + (1 - rows)
    u, v = u * (aspect / diagonal / columns), v * (1 / diagonal / rows)
    return torch.stack([u.expand(rows, columns), v[:, None].expand(rows, columns)]).to(like.dtype)


def with_view_plane(map_BCHW: Tensor, aspect: float) -> Tensor:
    """Append the two channels of `view_plane` to a map: convolutions then know where they are."""
    batch, _, rows, columns = map_BCHW.shape
    plane_2HW = view_plane(rows, columns, aspect, map_BCHW)
    return torch.cat([map_BCHW, plane_2HW.expand(batch, -1, -1, -1)], dim=1)


def convolution(channels_in: int, channels_out: int) -> nn.Conv2d:
    """Return a 3 x 3 convolution that keeps the size; borders are repeated."""
    return nn.Conv2d(channels_in, channels_out, kernel_size=3, padding=1, padding_mode="replicate")


def upsampler(channels_in: int, channels_out: int) -> nn.Sequential:
    """Return a transposed convolution to twice the size and a 3 x 3 convolution.

    At first the transposed one repeats each pixel four times: random weights would draw a checkerboard.
    """
    transposed = nn.ConvTranspose2d(channels_in, channels_out, kernel_size=2, stride=2)
    with torch.no_grad():
        transposed.weight.copy_(transposed.weight[:, :, :1, :1].expand_as(transposed.weight).clone())
    return nn.Sequential(transposed, convolution(channels_out, channels_out))


def precisely(module: nn.Module, map_BCHW: Tensor) -> Tensor:
    """Apply a module in float32 where all else is bfloat16, whose 8 bits would show as steps in depth."""
    kind = map_BCHW.device.type
    if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.bfloat16:
        with torch.autocast(kind, enabled=False):
            return module(map_BCHW.float())
    return module(map_BCHW)


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions, each after ReLU, added to the input.

    Args:
        channels: In and out.
        hidden: Channels between the two.
        norms: Whether each ReLU has a GroupNorm before it: of one group, then of groups of 32 channels.
    """

    def __init__(self, channels: int, hidden: int, norms: bool) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.GroupNorm(1, channels) if norms else nn.Identity(),
            nn.ReLU(),
            convolution(channels, hidden),
            nn.GroupNorm(max(hidden // GROUP, 1), hidden) if norms else nn.Identity(),
            nn.ReLU(),
            convolution(hidden, channels),
        )

    def forward(self, map_BCHW: Tensor) -> Tensor:
        """Return a map of the same shape."""
        return map_BCHW + self.layers(map_BCHW)


class ConvStack(nn.Module):
    """MoGe-2's decoder part: five levels of a feature pyramid, coarse to fine.

    At each level the input, through a 1 x 1 convolution, is added to what comes from below; residual blocks
    follow; then the map is doubled in size: by transposed convolutions, the last time by interpolation.

    Args:
        inputs: Channels of the input at each level.
        widths: Channels inside each level.
        blocks: Residual blocks of each level.
        output: Channels of the output of the last level; None: every level gives its map as it is.
    """

    def __init__(
        self, inputs: Sequence[int], widths: Sequence[int], blocks: Sequence[int], output: int | None = None
    ) -> None:
        super().__init__()
        self.input_blocks = nn.ModuleList(
            nn.Conv2d(channels, width, kernel_size=1) for channels, width in zip(inputs, widths, strict=True)
        )
        self.resamplers = nn.ModuleList(upsampler(here, above) for here, above in pairwise(widths[:-1]))
        interpolation = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)
        self.resamplers.append(nn.Sequential(interpolation, convolution(widths[-2], widths[-1])))
        self.res_blocks = nn.ModuleList(
            nn.Sequential(*(ResidualBlock(width, width, norms=False) for _ in range(count)))
            for width, count in zip(widths, blocks, strict=True)
        )
        outputs: list[nn.Module] = [nn.Identity() for _ in widths]
        if output is not None:
            outputs[-1] = nn.Conv2d(widths[-1], output, kernel_size=1)
        self.output_blocks = nn.ModuleList(outputs)

    def forward(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Return the map of each level.

        Args:
            inputs: (B, C, H 2^k, W 2^k) for level k.
        """
        outputs: list[Tensor] = []
        below: Tensor | None = None
        for level, map_BCHW in enumerate(inputs):
            here = self.input_blocks[level](map_BCHW)
            here = self.res_blocks[level](here if below is None else below + here)
            outputs.append(precisely(self.output_blocks[level], here))
            if level + 1 < len(inputs):
                below = self.resamplers[level](here)
        return outputs
