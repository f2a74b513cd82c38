"""From the points and the mask of one object to its label; photographs and the simulated world share it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from spear_lightning.errors import DataError
from spear_lightning.geometry.box_fit import fit_box, inliers
from spear_lightning.geometry.oriented_boxes import OrientedBox
from spear_lightning.labeling.object_surface import smooth_surface
from spear_lightning.labeling.records import ObjectLabel
from spear_lightning.labeling.run_lengths import encode_mask

NAN = float("nan")


@dataclass(frozen=True)
class BoxRecipe:
    """How points become a box.

    Attributes:
        erosion: Pixels taken off the mask's border, where points of the background mix in; 0 for exact masks.
        edge: Points are dropped where the depth within 3 x 3 pixels of the mask varies by more than this share of
            it; None keeps them (exact point maps).
        neighbours: Nearest neighbours in the outlier test.
        ratio: Robust standard deviations at which a point is an outlier; None: no test.
        max_points: Points used at most.
        min_points: Fewer points make no label.
        min_extent: Least edge length, as a share of the object's distance.
        smoothing: Pixels to each side of a pixel over which the surface is smoothed and continued to the mask's
            outline (see `object_surface`), for the box alone; 0: not (exact point maps).
    """

    erosion: int = 1
    edge: float | None = 0.04
    neighbours: int = 16
    ratio: float | None = 4.0
    max_points: int = 20_000
    min_points: int = 32
    min_extent: float = 0.004
    smoothing: int = 3


EXACT = BoxRecipe(erosion=0, edge=None, ratio=None, min_points=8, smoothing=0)
"""For masks and points without errors."""


def label_object(
    points_HW3: np.ndarray,
    mask_HW: np.ndarray,
    name: str,
    recipe: BoxRecipe = BoxRecipe(),
    box: OrientedBox | None = None,
    box_2d: np.ndarray | None = None,
    visible_fraction: float = NAN,
    detection_score: float = NAN,
) -> ObjectLabel:
    """Label one object: outliers out, smallest box around the rest, key points, scores.

    Args:
        points_HW3: (H, W, 3) point map in the OpenCV camera frame; not finite where nothing is known.
        mask_HW: bool (H, W), the object's visible pixels.
        name: What it is called.
        recipe: How points become a box.
        box: The box, where it is known already (a simulated world's ground truth); default: fitted.
        box_2d: (4,) left, top, right, bottom in pixels; default: the bounds of the mask.
        visible_fraction: See `ObjectLabel`.
        detection_score: See `ObjectLabel`.

    Returns:
        The label, in the unit of the points.

    Raises:
        DataError: If too few points are left, or part of the box lies behind the camera.
    """
    mask_HW = np.asarray(mask_HW, bool)
    points, outline = object_points(points_HW3, mask_HW, recipe)
    if len(points) < recipe.min_points:
        raise DataError(
            "An object has too few points",
            where=f"object {name!r}",
            found=f"{len(points)} of {int(mask_HW.sum())} pixels of its mask",
            expected=f"at least {recipe.min_points}",
        )
    distance = np.linalg.norm(points, axis=-1)
    if box is None:
        box = fit_box(np.concatenate([points, outline]), min_extent=recipe.min_extent * float(np.median(distance)))
    box = box.canonical()
    vertices = box.vertices()
    if float(vertices[:, 2].min()) <= 0:
        raise DataError(
            "The box of an object reaches behind the camera", where=f"object {name!r}", found=vertices.tolist()
        )
    return ObjectLabel(
        name=name,
        box_2d=mask_bounds(mask_HW) if box_2d is None else np.asarray(box_2d, np.float32),
        mask=encode_mask(mask_HW),
        centre=_float32(box.centre),
        quaternion=_float32(box.quaternion),
        extents=_float32(box.extents),
        vertices=_float32(vertices),
        closest=points[distance.argmin()].astype(np.float32),
        furthest=points[distance.argmax()].astype(np.float32),
        distance=float(torch.linalg.vector_norm(box.centre)),
        points=len(points),
        visible_fraction=visible_fraction,
        residual=_residual(box, points),
        detection_score=detection_score,
    )


def object_points(points_HW3: np.ndarray, mask_HW: np.ndarray, recipe: BoxRecipe) -> tuple[np.ndarray, np.ndarray]:
    """Return the (N, 3) float64 points of a mask that survive erosion, edge removal and the outlier test.

    Also (B, 3) points on the mask's outline, to which the surface was continued; none without smoothing.
    """
    depth_HW = points_HW3[..., 2]
    valid_HW = mask_HW & np.isfinite(points_HW3).all(-1) & (depth_HW > 0)
    rows, columns = np.flatnonzero(mask_HW.any(1)), np.flatnonzero(mask_HW.any(0))
    if not valid_HW.any():
        return np.zeros((0, 3)), np.zeros((0, 3))
    # All that follows looks at the mask's bounds alone.
    part = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    keep_HW = _inner(mask_HW[part], valid_HW[part], depth_HW[part], recipe)
    points = points_HW3[part][keep_HW].astype(np.float64)
    if recipe.ratio is not None:
        dense = inliers(points, recipe.neighbours, recipe.ratio, recipe.max_points)
        keep_HW[keep_HW] = dense
        points = points[dense]
    elif len(points) > recipe.max_points:
        points = points[_evenly(len(points), recipe.max_points)]
    if recipe.smoothing == 0 or len(points) < recipe.min_points:
        return points, np.zeros((0, 3))
    return smooth_surface(points_HW3[part], mask_HW[part], keep_HW, recipe.smoothing, recipe.erosion)


def _inner(mask_HW: np.ndarray, valid_HW: np.ndarray, depth_HW: np.ndarray, recipe: BoxRecipe) -> np.ndarray:
    from scipy import ndimage

    keep_HW = valid_HW
    if recipe.erosion:
        # Pixels at the image's border are not at the object's border.
        eroded_HW = (
            valid_HW
            & ndimage.binary_erosion(
                np.pad(mask_HW, 1, mode="edge"), np.ones((3, 3)), recipe.erosion, border_value=1
            )[1:-1, 1:-1]
        )
        keep_HW = eroded_HW if eroded_HW.sum() >= recipe.min_points else keep_HW
    if recipe.edge is not None:
        far = ndimage.maximum_filter(np.where(keep_HW, depth_HW, -np.inf), 3)
        near = ndimage.minimum_filter(np.where(keep_HW, depth_HW, np.inf), 3)
        keep_HW = keep_HW & (far - near <= recipe.edge * depth_HW)
    return keep_HW


def _evenly(count: int, wanted: int) -> np.ndarray:
    return np.linspace(0, count - 1, wanted).astype(np.int64)


def mask_bounds(mask_HW: np.ndarray) -> np.ndarray:
    """Return (left, top, right, bottom), float32 pixels, of a mask; right and bottom are exclusive."""
    rows, columns = np.flatnonzero(mask_HW.any(1)), np.flatnonzero(mask_HW.any(0))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], np.float32)


def _residual(box: OrientedBox, points: np.ndarray) -> float:
    local = (torch.from_numpy(points) - box.centre) @ box.axes.to(torch.float64)
    depth = (box.extents / 2 - local.abs()).abs().amin(-1)
    return float(depth.mean() / box.volume.clamp(min=1e-30) ** (1 / 3))


def _float32(values: torch.Tensor) -> np.ndarray:
    return values.to(torch.float32).numpy()
