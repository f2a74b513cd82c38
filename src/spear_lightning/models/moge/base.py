"""What MoGe v1 and v2 share: input resolution, remapping, camera recovery, files.

Wang et al., "MoGe: Unlocking Accurate Monocular Geometry Estimation" (CVPR 2025), and "MoGe-2" (2025). The network
gives points known up to a shift along z (and, in v1, a scale); `camera` finds the shift and the focal length.

Legend: B images, N tokens, D channels, H and W the image.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from spear_lightning.errors import CheckpointError, ConfigError, ShapeError
from spear_lightning.geometry.point_maps import PointMaps
from spear_lightning.models.encoders.dinov2 import IMAGENET_MEAN, IMAGENET_STD
from spear_lightning.models.encoders.dinov2_weights import original_names
from spear_lightning.models.encoders.moge import MogeEncoder
from spear_lightning.models.encoders.moge_weights import MogeFile, read_moge, write_moge
from spear_lightning.models.encoders.weight_files import load_exactly
from spear_lightning.models.moge.camera import (
    focal_from_widths,
    normalized_intrinsics,
    recover_camera,
    unproject,
)

PATCH = 14
"""Side of a token's patch, pixels."""

KNOWN = 0.5
"""Least value of the mask for a pixel whose point counts."""

TRAINED_AREA = 196
"""Pixels of a token; older configurations give areas instead of numbers of tokens."""


class MogeOutput(NamedTuple):
    """What the network says, at the images' size, float32.

    Attributes:
        points: (B, H, W, 3), OpenCV axes; true up to a shift along z and a positive scale.
        mask: (B, H, W), see `Moge.mask_values`.
        scale: (B,), what multiplies points to make them metric; None in v1.
        normals: (B, H, W, 3) unit normals of surfaces, camera frame; None without such a head.
    """

    points: Tensor
    mask: Tensor
    scale: Tensor | None = None
    normals: Tensor | None = None


class MogeDecoder(nn.ModuleDict):
    """All of MoGe but its transformer, under the published names."""


class Moge(nn.Module, ABC):
    """Base of MoGe v1 and v2.

    Args:
        encoder: The vision transformer; its `weights` are not used, they come with the decoder's.
        num_tokens_range: Fewest and most tokens of an image; published weights bring their own.
        detail: How many tokens an image gets, from 0 (fewest) to 9 (most).
        weights: MoGe's weights, published or ours: hub id, folder or file; `None` keeps the random ones.
    """

    image_mean: Tensor
    image_std: Tensor

    backbone_prefix: str
    """Where the transformer is in files of this version."""

    constants_prefix: str
    """Where the mean and standard deviation of pixels are in them."""

    def __init__(
        self, encoder: MogeEncoder, num_tokens_range: tuple[int, int], detail: int = 9, weights: str | None = None
    ) -> None:
        super().__init__()
        low, high = num_tokens_range
        if not 1 <= low <= high:
            raise ConfigError(
                "A range of token numbers is from few to many",
                where=f"{type(self).__name__}.num_tokens_range",
                found=list(num_tokens_range),
                expected="1 <= fewest <= most",
            )
        if not 0 <= detail <= 9:
            raise ConfigError(
                "There is no such detail", where=f"{type(self).__name__}.detail", found=detail, expected="0 to 9"
            )
        self.encoder = encoder
        self.num_tokens_range = (low, high)
        self.detail = detail
        self.weights = weights
        self.register_buffer("image_mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1))
        self.register_buffer("image_std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1))

    @property
    @abstractmethod
    def metric(self) -> bool:
        """Whether the network knows metres."""

    @abstractmethod
    def predict(self, images_B3HW: Tensor, num_tokens: int) -> MogeOutput:
        """Return the network's output for float images in [0, 1]."""

    @abstractmethod
    def mask_values(self, mask_BHW: Tensor) -> Tensor:
        """Return how much the network believes that there is a surface: nothing at 0, sure at 1."""

    @abstractmethod
    def mask_loss(self, mask_BHW: Tensor, known_BHW: Tensor) -> Tensor:
        """Return the scalar loss of masks against where surfaces truly are (bool)."""

    @abstractmethod
    def published_config(self) -> dict[str, Any]:
        """Return the entries of a file's configuration that its readers ask for."""

    @property
    def num_tokens(self) -> int:
        """Tokens of an image at the chosen detail."""
        low, high = self.num_tokens_range
        return int(low + self.detail / 9 * (high - low))

    def forward(self, images_B3HW: Tensor, num_tokens: int | None = None) -> MogeOutput:
        """Predict points.

        Args:
            images_B3HW: uint8 RGB (B, 3, H, W), any size; best at full resolution.
            num_tokens: Tokens of an image, more are finer and slower; default: by `detail`.

        Raises:
            ShapeError: If the images are not uint8 (B, 3, H, W).
        """
        if images_B3HW.dtype != torch.uint8 or images_B3HW.ndim != 4 or images_B3HW.shape[1] != 3:
            raise ShapeError(
                "MoGe reads uint8 RGB images",
                where=type(self).__name__,
                found=f"{images_B3HW.dtype} {tuple(images_B3HW.shape)}",
                expected="torch.uint8 (B, 3, H, W)",
            )
        return self.predict(images_B3HW.float() / 255, self.num_tokens if num_tokens is None else num_tokens)

    def point_maps(
        self, images_B3HW: Tensor, focal_x_B: Tensor | None = None, num_tokens: int | None = None
    ) -> PointMaps:
        """Return points in camera frames, exactly on the rays of the recovered cameras.

        Args:
            images_B3HW: uint8 RGB (B, 3, H, W), any size.
            focal_x_B: Known focal lengths in image widths; NaN: not known. Default: none is known.
            num_tokens: See `forward`.

        Returns:
            The geometry: metric from v2, each image with a unit of its own from v1. Square pixels and a principal
            point in the middle are assumed. Images of which no camera can be recovered have no valid pixel.
        """
        return self.located(self(images_B3HW, num_tokens), focal_x_B)

    def located(self, output: MogeOutput, focal_x_B: Tensor | None = None) -> PointMaps:
        """Return the points of the network's output in camera frames; see `point_maps`."""
        height, width = output.mask.shape[1:]
        aspect = width / height
        focal_B = None if focal_x_B is None else focal_from_widths(focal_x_B, aspect)
        mask_BHW = self.mask_values(output.mask) > KNOWN
        camera = recover_camera(output.points, mask_BHW, focal_B)
        depth_BHW = output.points[..., 2] + camera.shift[:, None, None]
        if output.scale is not None:
            depth_BHW = depth_BHW * output.scale[:, None, None]
        valid_BHW = mask_BHW & (depth_BHW > 0) & depth_BHW.isfinite() & camera.found[:, None, None]
        intrinsics_B4 = normalized_intrinsics(camera.focal, aspect)
        points_BHW3 = unproject(depth_BHW, intrinsics_B4).masked_fill(~valid_BHW[..., None], torch.inf)
        return PointMaps(points_BHW3, valid_BHW, intrinsics_B4, self.metric)

    def features(self, pixels_B3HW: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return what the decoder reads: a map (B, D, h, w) of each of the encoder's layers, and the class token.

        Args:
            pixels_B3HW: Float images in [0, 1], sides multiples of 14.

        Returns:
            The maps, shallow to deep, and the class token (B, D) of the deepest.
        """
        normalised = (pixels_B3HW - self.image_mean) / self.image_std
        layers = self.encoder.layer_outputs(normalised.to(next(self.encoder.parameters()).dtype))
        grid = (pixels_B3HW.shape[2] // PATCH, pixels_B3HW.shape[3] // PATCH)
        return [layer[:, 1:].mT.unflatten(2, grid) for layer in layers], layers[-1][:, 0]

    def load_pretrained(self) -> None:
        """Load `weights`; does nothing when it is None.

        Raises:
            CheckpointError: If they cannot be read, or are of another architecture or version.
        """
        if self.weights is not None:
            self.take(read_moge(self.weights))

    def take(self, file: MogeFile) -> None:
        """Load a MoGe file, exactly.

        Raises:
            CheckpointError: If a name or shape differs, or the configuration asks for what this class does not do.
        """
        remap = file.config.get("remap_output", "exp")
        if remap != "exp":
            raise CheckpointError(
                "The weights want another remapping of points",
                where=file.where,
                found=f"remap_output: {remap}",
                expected="exp, as all published weights have",
            )
        self.encoder.take(file)
        decoder = file.decoder()
        constants = {name: decoder.pop(f"{self.constants_prefix}{name}", None) for name in _CONSTANTS}
        load_exactly(self.decoder, decoder, file.where)
        for name, value in constants.items():
            if not isinstance(value, Tensor) or value.numel() != 3:
                raise CheckpointError(
                    "The weights do not say how pixels are normalised",
                    where=file.where,
                    found=None if value is None else tuple(getattr(value, "shape", ())),
                    expected=f"{self.constants_prefix}{name} of shape (1, 3, 1, 1)",
                )
            getattr(self, name).copy_(value.view(1, 3, 1, 1))
        self.num_tokens_range = token_range(file.config, self.num_tokens_range)

    @property
    @abstractmethod
    def decoder(self) -> MogeDecoder:
        """All parameters but the transformer's."""

    def published_state(self) -> dict[str, Tensor]:
        """Return all weights under the names of published files."""
        transformer = original_names(self.encoder.model.state_dict())
        return {
            **{f"{self.constants_prefix}{name}": getattr(self, name) for name in _CONSTANTS},
            **{f"{self.backbone_prefix}{name}": value for name, value in transformer.items()},
            **self.decoder.state_dict(),
        }

    def save(self, path: str | Path) -> Path:
        """Write the weights under their published names, for `weights` of this class and of `MogeEncoder`.

        Args:
            path: A file name that ends in .safetensors.

        Returns:
            The file.
        """
        common = {"num_tokens_range": list(self.num_tokens_range), "remap_output": "exp"}
        return write_moge(path, self.published_state(), {**common, **self.published_config()})


_CONSTANTS = ("image_mean", "image_std")


def token_range(config: Mapping[str, Any], default: tuple[int, int]) -> tuple[int, int]:
    """Return the range of token numbers that a file's configuration names (older ones name pixels)."""
    if "num_tokens_range" in config:
        low, high = config["num_tokens_range"]
        return int(low), int(high)
    if "trained_area_range" in config:
        low, high = config["trained_area_range"]
        return int(low) // TRAINED_AREA, int(high) // TRAINED_AREA
    return default


def remapped(points_B3HW: Tensor) -> Tensor:
    """Return points (B, H, W, 3) of raw ones: z = exp(z'), x = x' z, y = y' z; float32."""
    raw_BHW3 = points_B3HW.float().movedim(1, -1)
    z = raw_BHW3[..., 2:].exp()
    return torch.cat([raw_BHW3[..., :2] * z, z], dim=-1)
