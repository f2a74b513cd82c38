"""Which pixels of a mask have points that can be trusted, and the object's points from them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from spear_lightning.geometry.outliers import inliers
from spear_lightning.labeling.object_surface import eroded, smooth_surface

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
        min_points: Fewer points make no label.
        min_extent: Least edge length, as a share of the object's distance.
        smoothing: Pixels to each side of a pixel over which the surface is smoothed and continued to the mask's
            outline (see `object_surface`), for the box alone; 0: not (exact point maps).
        max_points: About so many smoothed points are used at most, and those at the outline: of larger objects
            every second, third ... row and column.
    """

    erosion: int = 1
    edge: float | None = 0.04
    neighbours: int = 16
    ratio: float | None = 4.0
    min_points: int = 32
    min_extent: float = 0.004
    smoothing: int = 3
    max_points: int = 1_000


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
    finite_HW3 = np.isfinite(points_HW3)
    valid_HW = mask_HW & finite_HW3[..., 0] & finite_HW3[..., 1] & finite_HW3[..., 2] & (depth_HW > 0)
    if not valid_HW.any():
        return np.zeros((0, 3)), np.zeros((0, 3))
    keep_HW = _inner(mask_HW, valid_HW, depth_HW, recipe)
    if recipe.ratio is not None:
        keep_HW = inliers(points_HW3, keep_HW, recipe.neighbours, recipe.ratio)
    if recipe.smoothing == 0 or np.count_nonzero(keep_HW) < recipe.min_points:
        return points_HW3[keep_HW].astype(np.float64), np.zeros((0, 3))
    return smooth_surface(points_HW3, mask_HW, keep_HW, recipe.smoothing, recipe.erosion, recipe.max_points)


def _inner(mask_HW: np.ndarray, valid_HW: np.ndarray, depth_HW: np.ndarray, recipe: BoxRecipe) -> np.ndarray:
    keep_HW = valid_HW
    if recipe.ratio is not None:
        keep_HW = keep_HW & ~_speckles(depth_HW, keep_HW, recipe.ratio)
    if recipe.erosion:
        # Pixels at the image's border are not at the object's border.
        eroded_HW = keep_HW & eroded(mask_HW, recipe.erosion, beyond="edge")
        keep_HW = eroded_HW if np.count_nonzero(eroded_HW) >= recipe.min_points else keep_HW
    if recipe.edge is not None:
        far = _over_3x3(np.maximum, np.where(keep_HW, depth_HW, -np.inf))
        near = _over_3x3(np.minimum, np.where(keep_HW, depth_HW, np.inf))
        with np.errstate(invalid="ignore"):
            keep_HW = keep_HW & (far - near <= recipe.edge * depth_HW)
    return keep_HW


def _over_3x3(function: np.ufunc, values_HW: np.ndarray) -> np.ndarray:
    """Return the maximum or minimum over 3 x 3 pixels; borders are repeated."""
    padded_HW = np.pad(values_HW, 1, mode="edge")
    rows = function(function(padded_HW[:-2], padded_HW[1:-1]), padded_HW[2:])
    return function(function(rows[:, :-2], rows[:, 1:-1]), rows[:, 2:])


def _speckles(depth_HW: np.ndarray, known_HW: np.ndarray, ratio: float) -> np.ndarray:
    """Return which pixels are unlike those around them: single wild depths, before they spoil their neighbours."""
    filled_HW = _continued(depth_HW, known_HW)
    difference_HW = np.abs(filled_HW / _median_3x3(filled_HW) - 1)
    spread = 1.4826 * float(np.median(difference_HW[known_HW]))
    return known_HW & (difference_HW > np.maximum(SPECKLE, 1.5 * ratio * spread))


def _continued(depth_HW: np.ndarray, known_HW: np.ndarray) -> np.ndarray:
    """Return depths where each unknown pixel beside known ones has that of one of them; 1 farther off."""
    height, width = depth_HW.shape
    padded_HW = np.pad(np.where(known_HW, depth_HW, 0), 1)
    filled_HW = padded_HW[1:-1, 1:-1].copy()
    for down, right in ((0, 1), (1, 0), (1, 2), (2, 1), (0, 0), (0, 2), (2, 0), (2, 2)):
        beside_HW = padded_HW[down : down + height, right : right + width]
        np.copyto(filled_HW, beside_HW, where=filled_HW == 0)
    filled_HW[filled_HW == 0] = 1
    return filled_HW


def _median_3x3(values_HW: np.ndarray) -> np.ndarray:
    """Return the median of 3 x 3 pixels; borders are repeated.

    With the columns of three sorted, it is the median of the largest low, the middle middle and the smallest high.
    """
    padded_HW = np.pad(values_HW, 1, mode="edge")
    one, two, three = padded_HW[:-2], padded_HW[1:-1], padded_HW[2:]
    low = np.minimum(np.minimum(one, two), three)
    high = np.maximum(np.maximum(one, two), three)
    middle = _middle(one, two, three)
    return _middle(
        np.maximum(np.maximum(low[:, :-2], low[:, 1:-1]), low[:, 2:]),
        _middle(middle[:, :-2], middle[:, 1:-1], middle[:, 2:]),
        np.minimum(np.minimum(high[:, :-2], high[:, 1:-1]), high[:, 2:]),
    )


def _middle(one: np.ndarray, two: np.ndarray, three: np.ndarray) -> np.ndarray:
    return np.maximum(np.minimum(one, two), np.minimum(np.maximum(one, two), three))
