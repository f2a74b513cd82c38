"""The geometry step of labelling: images become point maps, by a network such as MoGe or from depth files."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from spear_lightning.errors import ConfigError, SpearError
from spear_lightning.geometry.cameras import NormalizedIntrinsics, PixelIntrinsics
from spear_lightning.geometry.point_maps import PointMaps
from spear_lightning.labeling.device_copies import fetch, own_stream, to_device
from spear_lightning.labeling.records import Unit


@dataclass(frozen=True, eq=False)
class PointMap:
    """The geometry of one image.

    Attributes:
        points_HW3: float32 (H, W, 3), the surface points that the pixels see, in the OpenCV camera frame; inf
            where nothing is known.
        valid_HW: bool (H, W), where points are known; they have z > 0 there.
        intrinsics: The camera, known or estimated.
        unit: Whether lengths are metres, or known up to one factor for the whole image.
    """

    points_HW3: np.ndarray
    valid_HW: np.ndarray
    intrinsics: PixelIntrinsics
    unit: Unit

    @property
    def median_depth(self) -> float:
        """Median z of the valid pixels, in the unit of the points; NaN if there are none."""
        depth = self.points_HW3[..., 2][self.valid_HW]
        return float(np.median(depth)) if len(depth) else float("nan")


class Geometry(ABC):
    """Finds the geometry of images. One object serves one process; `prepare` is called before the first image."""

    @property
    @abstractmethod
    def version(self) -> str:
        """What made the points and in which version, for a label's provenance."""

    @abstractmethod
    def point_maps(
        self,
        images: Sequence[np.ndarray],
        image_ids: Sequence[str],
        intrinsics: Sequence[PixelIntrinsics | None] | None = None,
    ) -> list[PointMap | SpearError]:
        """Return the point map of each image at its own resolution.

        Args:
            images: uint8 RGB (H, W, 3), of any sizes.
            image_ids: Their names, as in `ImageLabel.image_id`.
            intrinsics: Their cameras where known, each for its image's size. Default: none is known. A network
                takes the focal length alone, and the principal point to be in the middle.

        Returns:
            For each image its point map, or the error that says why there is none: a bad image does not spoil
            its batch.
        """

    @abstractmethod
    def prepare(self, device: torch.device | str = "cpu") -> None:
        """Load weights and move to a device, or see whether the files are there; called once per process.

        Args:
            device: Where to compute.

        Raises:
            SpearError: If weights cannot be read or do not fit, or there are no files.
        """


class PointMapNetwork(Protocol):
    """What `NetworkGeometry` needs of a network, such as `spear_lightning.models.MogeV1`; a torch module."""

    weights: str | None

    def load_pretrained(self) -> None:
        """Load the weights that `weights` names; nothing if it is None."""

    def point_maps(self, images_B3HW: Tensor, focal_x_B: Tensor | None = None) -> PointMaps:
        """Return the geometry of uint8 RGB images of one size; NaN focal lengths (in widths) are not known."""


class NetworkGeometry(Geometry):
    """Point maps by a network, batched over images of one size.

    Args:
        network: The network, a torch module, for example `spear_lightning.models.MogeV1`.
        batch_size: Images of one size that go through the network together.
        half: Compute in float16 (on a GPU; float32 elsewhere). Points are found in float32 all the same.
    """

    def __init__(self, network: PointMapNetwork, batch_size: int = 8, half: bool = True) -> None:
        if batch_size < 1:
            raise ConfigError(
                "A batch needs an image", where="geometry.batch_size", found=batch_size, expected="at least 1"
            )
        self.network = network
        self.batch_size = batch_size
        self.half = half
        self.device = torch.device("cpu")

    @property
    def version(self) -> str:
        """Class and weights of the network."""
        return f"{type(self.network).__name__} {self.network.weights or '(random weights)'}"

    def prepare(self, device: torch.device | str = "cpu") -> None:
        """Load the network's weights and move it (see `Geometry.prepare`)."""
        self.device = torch.device(device)
        self.network.load_pretrained()
        if isinstance(self.network, torch.nn.Module):
            self.network.eval().requires_grad_(False).to(self.device)

    def point_maps(
        self,
        images: Sequence[np.ndarray],
        image_ids: Sequence[str],
        intrinsics: Sequence[PixelIntrinsics | None] | None = None,
    ) -> list[PointMap | SpearError]:
        """Return the point map of each image (see `Geometry`); images of one size share batches."""
        cameras = intrinsics or [None] * len(images)
        same_size: dict[tuple[int, ...], list[int]] = {}
        for index, image_HW3 in enumerate(images):
            same_size.setdefault(image_HW3.shape, []).append(index)
        found: dict[int, PointMap | SpearError] = {}
        for indices in same_size.values():
            for start in range(0, len(indices), self.batch_size):
                chosen = indices[start : start + self.batch_size]
                results = self._batch([images[index] for index in chosen], [cameras[index] for index in chosen])
                found.update(zip(chosen, results, strict=True))
        return [found[index] for index in range(len(images))]

    @torch.inference_mode()
    def _batch(
        self, images: Sequence[np.ndarray], cameras: Sequence[PixelIntrinsics | None]
    ) -> list[PointMap | SpearError]:
        focals = [float("nan") if camera is None else camera.fx / camera.width for camera in cameras]
        half = self.half and self.device.type == "cuda"
        with own_stream(self.device), torch.autocast(self.device.type, torch.float16, enabled=half):
            images_B3HW = to_device(images, self.device).permute(0, 3, 1, 2)
            focal_B = to_device([np.array(focal, np.float32) for focal in focals], self.device)
            maps = self.network.point_maps(images_B3HW, focal_B)
            points_BHW3, valid_BHW, cameras_B4 = fetch([maps.points, maps.valid, maps.intrinsics])
        height, width = images[0].shape[:2]
        return [
            PointMap(points_HW3, valid_HW, NormalizedIntrinsics(*camera).pixels(height, width), unit_of(maps))
            for points_HW3, valid_HW, camera in zip(points_BHW3, valid_BHW, cameras_B4.tolist(), strict=True)
        ]


def unit_of(maps: PointMaps) -> Unit:
    """Return the unit of point maps as labels name it."""
    return "metric" if maps.metric else "scale_free"
