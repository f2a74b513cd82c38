"""Which points of a point map lie apart from the rest: statistical outlier removal.

scipy (extra `label`) gives the neighbour search. Few points need it: most lie in such company in the image that
their nearest neighbours are surely near enough.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from scipy.spatial import cKDTree

SLANTED = 4.0
"""Points this many times sparser than usual may still be a surface seen at a grazing angle."""

SAMPLED = 128
"""Points whose spacing says what is usual."""

AROUND = 4
"""Pixels to each side of a sampled one in which its nearest neighbours are sought."""

COMPANY = 3
"""Pixels to each side of a pixel that are its company; it decides about speed alone."""


def inliers(points_HW3: np.ndarray, known_HW: np.ndarray, neighbours: int = 16, ratio: float = 4.0) -> np.ndarray:
    """Tell which points lie as densely as the rest (statistical outlier removal).

    A point is an outlier if its mean distance to its nearest neighbours is far from usual. Distances are
    compared in logarithms by median and median absolute deviation, so that neither the outliers themselves nor the
    falling density of a slanted surface move the limit much (Open3D uses mean and standard deviation).

    Args:
        points_HW3: (H, W, 3) points as an image sees them, any unit; finite where known.
        known_HW: bool (H, W), the points that are looked at.
        neighbours: Nearest neighbours of a point that are looked at.
        ratio: Robust standard deviations above the median at which a point is left out, if it is also `SLANTED`
            times sparser than usual.

    Returns:
        bool (H, W), True for known points that are no outliers.
    """
    places = np.flatnonzero(known_HW)
    if len(places) <= neighbours:
        return known_HW.copy()
    points_N3 = points_HW3.reshape(-1, 3)[places].astype(np.float64)
    points_N3 -= points_N3.mean(0)
    spacing = _Spacing(points_N3, neighbours)
    sample = evenly(len(places), min(len(places), SAMPLED))
    usual = np.log(_spacing_in_image(points_N3, known_HW, places, sample, spacing))
    middle = np.median(usual)
    spread = 1.4826 * np.median(np.abs(usual - middle))
    limit = math.exp(middle + max(ratio * spread, math.log(SLANTED)))
    dense = _in_company(points_N3, known_HW, limit, neighbours)
    (open_ones,) = np.nonzero(~dense)
    if len(open_ones):
        dense[open_ones] = spacing(open_ones) <= limit
    found_HW = np.zeros_like(known_HW)
    found_HW[known_HW] = dense
    return found_HW


class _Spacing:
    """Mean distances of points (N, 3) to their nearest neighbours."""

    def __init__(self, points_N3: np.ndarray, neighbours: int) -> None:
        self._points, self.neighbours = points_N3, neighbours
        self._tree: cKDTree | None = None

    def __call__(self, which: np.ndarray) -> np.ndarray:
        from scipy.spatial import cKDTree

        if self._tree is None:
            self._tree = cKDTree(self._points, balanced_tree=False, compact_nodes=False)
        # The nearest neighbour of a point is the point itself.
        distances, _ = self._tree.query(self._points[which], k=self.neighbours + 1)
        return np.maximum(distances[:, 1:].mean(1), np.finfo(np.float64).tiny)


def _spacing_in_image(
    points_N3: np.ndarray, known_HW: np.ndarray, places: np.ndarray, sample: np.ndarray, spacing: _Spacing
) -> np.ndarray:
    """Return the spacing of a sample of points, with neighbours near it in the image where they are enough."""
    side = 2 * AROUND + 1
    if spacing.neighbours >= side * side:
        return spacing(sample)
    number_HW = np.full((known_HW.shape[0] + 2 * AROUND, known_HW.shape[1] + 2 * AROUND), -1)
    number_HW[AROUND:-AROUND, AROUND:-AROUND][known_HW] = np.arange(len(places))
    rows, columns = np.divmod(places[sample], known_HW.shape[1])
    down, right = np.divmod(np.arange(side * side), side)
    around = number_HW[rows[:, None] + down, columns[:, None] + right]
    between = points_N3[around] - points_N3[sample][:, None]
    distances = np.where(around >= 0, np.sqrt(np.einsum("sni,sni->sn", between, between)), np.inf)
    nearest = np.partition(distances, spacing.neighbours, axis=1)[:, : spacing.neighbours + 1]
    mean = np.maximum(nearest.sum(1) / spacing.neighbours, np.finfo(np.float64).tiny)
    (few,) = np.nonzero(np.isinf(mean))
    if len(few):
        mean[few] = spacing(sample[few])
    return mean


def _in_company(points_N3: np.ndarray, known_HW: np.ndarray, limit: float, neighbours: int) -> np.ndarray:
    """Return which points are surely no farther than a limit from their nearest neighbours, on average; (N,).

    The mean distance of one to all others of its company, if they are enough, is no less than that to its nearest
    neighbours, and no more than the root of the mean square, which the company's moments give.
    """
    from scipy import ndimage

    points_3HW = np.zeros((3, *known_HW.shape))
    for values_HW, values in zip(points_3HW, points_N3.T, strict=True):
        values_HW[known_HW] = values
    squares_HW = (points_3HW * points_3HW).sum(0)
    side = 2 * COMPANY + 1
    moments_5HW = np.stack([known_HW.astype(np.float64), *points_3HW, squares_HW])
    for axis in (1, 2):
        moments_5HW = ndimage.uniform_filter1d(moments_5HW, side, axis, mode="constant")
    moments_5HW *= side * side
    members_HW = np.rint(moments_5HW[0])
    total_HW = members_HW * squares_HW - 2 * (points_3HW * moments_5HW[1:4]).sum(0) + moments_5HW[4]
    return ((members_HW > neighbours) & (total_HW <= (members_HW - 1) * limit**2))[known_HW]


def evenly(count: int, wanted: int) -> np.ndarray:
    """Return the places of so many out of `count` things, in order and evenly spread."""
    return np.linspace(0, count - 1, wanted).astype(np.int64)
