"""Geometry from files: a depth image and a camera beside each picture, as RGB-D cameras and simulators give."""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from spear_lightning.errors import ConfigError, DataError, SpearError
from spear_lightning.geometry.cameras import PixelIntrinsics
from spear_lightning.labeling.geometry import Geometry, PointMap
from spear_lightning.labeling.records import Unit

CAMERA_FILE = "camera.json"
"""Holds the camera of all pictures of a folder that have none of their own."""

FORMATS = "NAME.npz, or NAME.png with NAME.json or camera.json beside it"

_UNREADABLE = (
    *(OSError, ValueError, KeyError, TypeError, SyntaxError, EOFError),
    *(zipfile.BadZipFile, zlib.error, UnidentifiedImageError),
)
"""What numpy, zipfile and Pillow raise when a file is empty, cut off or spoilt."""


class DepthFiles(Geometry):
    """Reads depth images; pixels of depth 0, or that is not finite, are not known.

    The picture `NAME` (its image id, with or without an ending such as .jpg, folders included) has one of:

    - `NAME.npz`: `depth` (H, W), any number type, times `depth_unit`; and `intrinsics`, (3, 3) or fx, fy, cx, cy;
    - `NAME.png`: 16 bit, times `depth_unit`; the camera is in `NAME.json` or in the folder's `camera.json`, as
      `{"fx": .., "fy": .., "cx": .., "cy": .., "depth_unit": ..}`; the last entry may be absent.

    Intrinsics are pixels of the depth image (pixel centres at +0.5), which is as large as the picture. Where the
    pipeline knows the camera of an image, files without one will do.

    Args:
        folder: Where the files are.
        depth_unit: Length of a depth of 1: 1 for metres, 0.001 for millimetres.
        unit: What lengths are then: "metric", or "scale_free" if the depth has an unknown factor.
    """

    def __init__(self, folder: str, depth_unit: float = 1.0, unit: Unit = "metric") -> None:
        if not depth_unit > 0:
            raise ConfigError("A unit of depth is positive", where="geometry.depth_unit", found=depth_unit)
        self.folder = Path(folder)
        self.depth_unit = depth_unit
        self.unit: Unit = unit

    @property
    def version(self) -> str:
        """Where the depth is from."""
        return f"depth files of {self.folder.name}"

    def prepare(self, device: torch.device | str = "cpu") -> None:
        """See whether the folder is there.

        Raises:
            DataError: If it is not.
        """
        if not self.folder.is_dir():
            raise DataError("There is no such folder of depth files", where=self.folder, expected=FORMATS)

    def point_maps(
        self,
        images: Sequence[np.ndarray],
        image_ids: Sequence[str],
        intrinsics: Sequence[PixelIntrinsics | None] | None = None,
    ) -> list[PointMap | SpearError]:
        """Read the point map of each image (see `Geometry`)."""
        cameras = intrinsics or [None] * len(images)
        results: list[PointMap | SpearError] = []
        for image_HW3, image_id, camera in zip(images, image_ids, cameras, strict=True):
            try:
                results.append(self._read(image_HW3.shape[:2], image_id, camera))
            except SpearError as error:
                results.append(error)
        return results

    def _read(self, size: tuple[int, ...], image_id: str, camera: PixelIntrinsics | None) -> PointMap:
        path = self._path(image_id)
        try:
            depth_HW, given = _read_npz(path) if path.suffix == ".npz" else _read_png(path)
            unit = float(given.get("depth_unit", self.depth_unit))
        except _UNREADABLE as error:
            raise DataError(
                "A depth file cannot be read",
                where=path,
                found=f"{type(error).__name__}: {error}",
                expected=FORMATS,
            ) from error
        if depth_HW.shape != size:
            raise DataError(
                "A depth image is not of its picture's size",
                where=path,
                found=f"{depth_HW.shape[::-1]} pixels (width, height)",
                expected=f"{size[::-1]}",
                remedy="register the depth to the picture first",
            )
        if camera is None:
            camera = _camera(given, size, path)
        return unprojected(depth_HW * unit, camera, self.unit)

    def _path(self, image_id: str) -> Path:
        root = self.folder.resolve()
        for name in (image_id, str(Path(image_id).with_suffix(""))):
            for suffix in (".npz", ".png"):
                path = (root / (name + suffix)).resolve()
                # An image id is data, and must not lead out of the folder.
                if path.is_relative_to(root) and path.is_file():
                    return path
        raise DataError("An image has no depth file", where=f"{self.folder}/{image_id}", expected=FORMATS)


def unprojected(depth_HW: np.ndarray, camera: PixelIntrinsics, unit: Unit) -> PointMap:
    """Return the point map of a depth image.

    Args:
        depth_HW: (H, W) z coordinates in the camera frame; 0, negative or not finite where nothing is known.
        camera: The camera, for H x W pixels.
        unit: The unit of depth.
    """
    valid_HW = np.isfinite(depth_HW) & (depth_HW > 0)
    rows, columns = depth_HW.shape
    points_HW3 = np.empty((rows, columns, 3), np.float32)
    points_HW3[..., 0] = (np.arange(columns) + 0.5 - camera.cx) / camera.fx
    points_HW3[..., 1] = ((np.arange(rows) + 0.5 - camera.cy) / camera.fy)[:, None]
    points_HW3[..., 2] = 1
    points_HW3 *= np.where(valid_HW, depth_HW, 0)[..., None]
    points_HW3[~valid_HW] = np.inf
    return PointMap(points_HW3, valid_HW, camera, unit)


def _read_npz(path: Path) -> tuple[np.ndarray, dict[str, Any]]:
    with np.load(path, allow_pickle=False) as file:
        depth_HW = np.asarray(file["depth"], np.float64)
        if "intrinsics" not in file:
            return depth_HW, {}
        intrinsics = np.asarray(file["intrinsics"], np.float64)
    if intrinsics.shape == (3, 3):
        intrinsics = intrinsics[[0, 1, 0, 1], [0, 1, 2, 2]]
    return depth_HW, dict(zip(("fx", "fy", "cx", "cy"), intrinsics.tolist(), strict=True))


def _read_png(path: Path) -> tuple[np.ndarray, dict[str, Any]]:
    with Image.open(path) as image:
        if not image.mode.startswith("I"):
            raise ValueError(f"mode {image.mode}, a depth image has 16 bits a pixel")
        depth_HW = np.asarray(image, np.float64)
    for beside in (path.with_suffix(".json"), path.with_name(CAMERA_FILE)):
        if beside.is_file():
            return depth_HW, dict(json.loads(beside.read_text(encoding="utf-8")))
    return depth_HW, {}


def _camera(given: dict[str, Any], size: tuple[int, ...], path: Path) -> PixelIntrinsics:
    try:
        fx, fy, cx, cy = (float(given[name]) for name in ("fx", "fy", "cx", "cy"))
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            "A depth image has no camera",
            where=path,
            found=sorted(given),
            expected="fx, fy, cx, cy in pixels: `intrinsics` in the .npz, or a .json beside the .png",
        ) from error
    return PixelIntrinsics(fx, fy, cx, cy, width=size[1], height=size[0])
