"""Which pixels of a mask have points that can be trusted, and the object's points from them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from spear_lightning.geometry.outliers import evenly, inliers
from spear_lightning.labeling.object_surface import smooth_surface

SPECKLE = 0.006
"""A pixel whose depth differs by less than this share from the median around it is no single wild one."""


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


def object_points(points_HW3: np.ndarray, mask_HW: np.ndarray, recipe: BoxRecipe) -> tuple[np.ndarray, np.ndarray]:
    """Return the (N, 3) float64 points of a mask that survive erosion, edge removal and the outlier test.

    Also (B, 3) points on the mask's outline, to which the surface was continued; none without smoothing.
    """
    rows, columns = np.flatnonzero(mask_HW.any(1)), np.flatnonzero(mask_HW.any(0))
    if not len(rows):
        return np.zeros((0, 3)), np.zeros((0, 3))
    # All that follows looks at the mask's bounds alone.
    part = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    points_HW3, mask_HW = points_HW3[part], mask_HW[part]
    depth_HW = points_HW3[..., 2]
    valid_HW = mask_HW & np.isfinite(points_HW3).all(-1) & (depth_HW > 0)
    if not valid_HW.any():
        return np.zeros((0, 3)), np.zeros((0, 3))
    keep_HW = _inner(mask_HW, valid_HW, depth_HW, recipe)
    points = points_HW3[keep_HW].astype(np.float64)
    if recipe.ratio is not None:
        dense = inliers(points, recipe.neighbours, recipe.ratio, recipe.max_points)
        keep_HW[keep_HW] = dense
        points = points[dense]
    elif len(points) > recipe.max_points:
        points = points[evenly(len(points), recipe.max_points)]
    if recipe.smoothing == 0 or len(points) < recipe.min_points:
        return points, np.zeros((0, 3))
    return smooth_surface(points_HW3, mask_HW, keep_HW, recipe.smoothing, recipe.erosion)


def _inner(mask_HW: np.ndarray, valid_HW: np.ndarray, depth_HW: np.ndarray, recipe: BoxRecipe) -> np.ndarray:
    from scipy import ndimage

    keep_HW = valid_HW
    if recipe.ratio is not None:
        keep_HW = keep_HW & ~_speckles(depth_HW, keep_HW, recipe.ratio)
    if recipe.erosion:
        # Pixels at the image's border are not at the object's border.
        eroded_HW = (
            keep_HW
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


def _speckles(depth_HW: np.ndarray, known_HW: np.ndarray, ratio: float) -> np.ndarray:
    """Return which pixels are unlike those around them: single wild depths, before they spoil their neighbours."""
    from scipy import ndimage

    # Beyond the object its own border is repeated.
    nearest = ndimage.distance_transform_edt(~known_HW, return_distances=False, return_indices=True)
    filled_HW = depth_HW[tuple(nearest)]
    difference_HW = np.abs(filled_HW / ndimage.median_filter(filled_HW, 3) - 1)
    spread = 1.4826 * float(np.median(difference_HW[known_HW]))
    return known_HW & (difference_HW > np.maximum(SPECKLE, 1.5 * ratio * spread))
