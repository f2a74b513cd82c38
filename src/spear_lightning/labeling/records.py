"""What a label is: one record for an image, and one for each object in it.

All geometry is in the OpenCV camera frame of the image (x right, y down, z forward), in metres if the label's unit
is "metric", and known up to one factor for the whole image if it is "scale_free" (MoGe v1). Pixel coordinates
are (u, v) with the origin at the top-left corner of the top-left pixel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
import torch

from spear_lightning.errors import DataError
from spear_lightning.geometry.cameras import PixelIntrinsics
from spear_lightning.geometry.oriented_boxes import OrientedBox

Unit = Literal["metric", "scale_free"]
"""Whether lengths are metres, or known up to a factor."""


@dataclass(frozen=True, eq=False)
class ObjectLabel:
    """One object of an image.

    Attributes:
        name: What the object is called, for example "red mug"; not empty.
        box_2d: (4,) float32, left, top, right, bottom in pixels.
        mask: (R,) int64 run lengths of its visible pixels (`run_lengths.encode_mask`); empty where not kept.
        centre: (3,) float32, centre of the 3D box.
        quaternion: (4,) float32, unit quaternion xyzw, w >= 0, box axes -> camera frame.
        extents: (3,) float32, full edge lengths along the box's axes.
        vertices: (8, 3) float32 in the canonical order of `geometry.oriented_boxes`.
        closest: (3,) float32, the visible point nearest to the camera.
        furthest: (3,) float32, the visible point farthest from the camera.
        distance: Distance from the camera to the centre of the box.
        points: Number of points the box was fitted to.
        visible_fraction: Share of the object's pixels that nothing else hides, in [0, 1]; NaN where unknown.
        residual: Mean distance of its points from the surface of the box, as a share of the cube root of the
            volume; large values mean that it is no box at all, or that the points are bad.
        detection_score: Confidence of the detector, in [0, 1]; NaN where there is none.
    """

    name: str
    box_2d: np.ndarray
    mask: np.ndarray
    centre: np.ndarray
    quaternion: np.ndarray
    extents: np.ndarray
    vertices: np.ndarray
    closest: np.ndarray
    furthest: np.ndarray
    distance: float
    points: int
    visible_fraction: float = float("nan")
    residual: float = float("nan")
    detection_score: float = float("nan")

    @property
    def box(self) -> OrientedBox:
        """The 3D box, float32, without leading dimensions."""
        return OrientedBox(*(torch.from_numpy(part) for part in (self.centre, self.quaternion, self.extents)))


@dataclass(frozen=True, eq=False)
class ImageLabel:
    """One labelled image.

    Attributes:
        image_id: Name of the image, unique in a data set, and stable: work is divided and resumed by it.
        width: Pixels.
        height: Pixels.
        source: Where the image is from, such as a data set's name.
        unit: Whether lengths are metres or known up to a factor.
        median_depth: Median z of the image's valid pixels, in the unit of the label; > 0.
        objects: Its objects, in the detector's order. Names may repeat: several instances of a thing.
        intrinsics: The camera, where known.
        pixels: (K, 2) float32 pixel coordinates, drawn at random from the pixels with known geometry.
        pixel_points: (K, 3) float32, the points seen there.
        provenance: Step ("detector", "segmenter", "geometry", "box") -> model and version.
    """

    image_id: str
    width: int
    height: int
    source: str
    unit: Unit
    median_depth: float
    objects: tuple[ObjectLabel, ...]
    intrinsics: PixelIntrinsics | None = None
    pixels: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.float32))
    pixel_points: np.ndarray = field(default_factory=lambda: np.zeros((0, 3), np.float32))
    provenance: Mapping[str, str] = field(default_factory=dict)


def check_label(label: ImageLabel, where: object = None) -> None:
    """Check that a label can be used.

    Args:
        label: The label.
        where: What to name in an error besides the image, such as the file.

    Raises:
        DataError: Naming the image, the object and the one thing that is wrong.
    """
    _demand(bool(label.image_id), "An image label has no image id", label, where, label.image_id, "a name")
    _demand(
        min(label.width, label.height) > 0,
        "A labelled image has no pixels",
        label,
        where,
        f"{label.width} x {label.height}",
        "positive sizes",
    )
    _demand(
        label.unit in get_args(Unit),
        "The unit of a label is unknown",
        label,
        where,
        label.unit,
        " or ".join(get_args(Unit)),
    )
    _demand(
        bool(np.isfinite(label.median_depth)) and label.median_depth > 0,
        "The median depth of a label is not positive",
        label,
        where,
        label.median_depth,
        "> 0",
    )
    camera = label.intrinsics
    if camera is not None:
        _demand(
            (camera.width, camera.height) == (label.width, label.height),
            "The camera of a label is that of another image size",
            label,
            where,
            f"{camera.width} x {camera.height}",
            f"{label.width} x {label.height}",
        )
    _demand(
        len(label.pixels) == len(label.pixel_points),
        "A label has pixels without points",
        label,
        where,
        (label.pixels.shape, label.pixel_points.shape),
        "as many of one as of the other",
    )
    _check_points(label.pixel_points, "A pixel's point", label, where)
    for number, item in enumerate(label.objects):
        _check_object(item, label, f"object {number} ({item.name!r})" + (f" in {where}" if where else ""))


def _check_object(item: ObjectLabel, label: ImageLabel, where: str) -> None:
    _demand(bool(item.name.strip()), "An object has no name", label, where, repr(item.name), "a name")
    geometry = np.concatenate([item.vertices, item.centre[None], item.closest[None], item.furthest[None]])
    _check_points(geometry, "A point of an object", label, where)
    norm = float(np.linalg.norm(item.quaternion))
    _demand(abs(norm - 1) < 1e-4, "An object's quaternion is not of unit norm", label, where, norm, 1)
    _demand(bool((item.extents >= 0).all()), "An extent is negative", label, where, item.extents, ">= 0")
    left, top, right, bottom = item.box_2d.tolist()
    _demand(
        0 <= left <= right <= label.width and 0 <= top <= bottom <= label.height,
        "A 2D box does not lie in its image",
        label,
        where,
        item.box_2d.tolist(),
        f"left, top, right, bottom within {label.width} x {label.height}",
    )
    _demand(
        item.mask.size == 0 or int(item.mask.sum()) == label.width * label.height,
        "A mask is that of another image size",
        label,
        where,
        f"{int(item.mask.sum())} pixels",
        f"{label.width} x {label.height} pixels",
    )


def _check_points(points: np.ndarray, what: str, label: ImageLabel, where: object) -> None:
    _demand(bool(np.isfinite(points).all()), f"{what} is not finite", label, where, points, "finite numbers")
    behind = points[points[:, 2] <= 0]
    _demand(
        len(behind) == 0,
        f"{what} lies behind the camera",
        label,
        where,
        behind[:1].tolist(),
        "z > 0 (OpenCV camera frame: z points forward)",
    )


def _demand(fine: bool, what: str, label: ImageLabel, where: object, found: object, expected: object) -> None:
    if not fine:
        place = f"image {label.image_id!r}" + (f", {where}" if where else "")
        raise DataError(
            what,
            where=place,
            found=found,
            expected=expected,
            remedy="label the image again, or leave it out",
        )
