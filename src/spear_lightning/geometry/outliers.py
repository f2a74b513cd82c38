"""Which points of a cloud lie apart from the rest: statistical outlier removal.

scipy (extra `label`) gives the neighbour search. Few points need it: most lie in such company that their nearest
neighbours are surely near enough.
"""

from __future__ import annotations

import math

import numpy as np

SLANTED = 4.0
"""Points this many times sparser than usual may still be a surface seen at a grazing angle."""

SAMPLED = 512
"""Points whose spacing says what is usual."""

CELL = 1.25
"""Side of the cells in which points are counted, as a multiple of the limit; it decides about speed alone."""

CELLS = 1 << 14
"""Cells that are told apart."""

CELL_NUMBERS = np.array([1, 131, 131 * 127])
"""What a cell's number grows by along x, y, z."""


def inliers(
    points_N3: np.ndarray, neighbours: int = 16, ratio: float = 4.0, max_points: int = 20_000
) -> np.ndarray:
    """Tell which points lie as densely as the rest (statistical outlier removal).

    A point is an outlier if its mean distance to its nearest neighbours is far from usual. Distances are
    compared in logarithms by median and median absolute deviation, so that neither the outliers themselves nor the
    falling density of a slanted surface move the limit much (Open3D uses mean and standard deviation).

    Args:
        points_N3: (N, 3) points, finite, any unit.
        neighbours: Nearest neighbours of a point that are looked at.
        ratio: Robust standard deviations above the median at which a point is left out, if it is also `SLANTED`
            times sparser than usual.
        max_points: Points measured; larger clouds are thinned evenly, and left-out points belong to no box.

    Returns:
        bool (N,).
    """
    count = len(points_N3)
    keep = np.zeros(count, bool)
    chosen = np.arange(count) if count <= max_points else evenly(count, max_points)
    if len(chosen) <= neighbours:
        keep[chosen] = True
        return keep
    points = points_N3[chosen] - points_N3[chosen].mean(0)
    spacing = _Spacing(points, neighbours)
    usual = np.log(spacing(evenly(len(points), min(len(points), SAMPLED))))
    middle = np.median(usual)
    spread = 1.4826 * np.median(np.abs(usual - middle))
    limit = math.exp(middle + max(ratio * spread, math.log(SLANTED)))
    dense = _crowded(points, limit, neighbours, 0.0) | _crowded(points, limit, neighbours, 0.5)
    (open_ones,) = np.nonzero(~dense)
    dense[open_ones] = spacing(open_ones) <= limit
    keep[chosen] = dense
    return keep


class _Spacing:
    """Mean distances of points (N, 3) to their nearest neighbours."""

    def __init__(self, points: np.ndarray, neighbours: int) -> None:
        from scipy.spatial import cKDTree

        self._points, self._neighbours = points, neighbours
        self._tree = cKDTree(points, balanced_tree=False, compact_nodes=False)

    def __call__(self, which: np.ndarray) -> np.ndarray:
        # The nearest neighbour of a point is the point itself.
        distances, _ = self._tree.query(self._points[which], k=self._neighbours + 1)
        return np.maximum(distances[:, 1:].mean(1), np.finfo(np.float64).tiny)


def _crowded(points: np.ndarray, limit: float, neighbours: int, shift: float) -> np.ndarray:
    """Return which points are surely no farther than a limit from their nearest neighbours, on average; (N,).

    The points are put into cells. The mean distance of one to all others of its cell, if they are enough, is no
    less than that to its nearest neighbours, and no more than the root of the mean square, which the cell's
    moments give. This holds for any set of points: that distant cells may share a number costs time alone.
    """
    cells = np.floor(points / (CELL * limit) + shift).astype(np.int64) @ CELL_NUMBERS % CELLS
    count = np.bincount(cells, minlength=CELLS)
    squares = np.einsum("ni,ni->n", points, points)
    sums = np.stack([np.bincount(cells, values, CELLS) for values in (*points.T, squares)], axis=1)[cells]
    members = count[cells]
    total = members * squares - 2 * np.einsum("ni,ni->n", points, sums[:, :3]) + sums[:, 3]
    return (members > neighbours) & (total <= (members - 1) * limit**2)


def evenly(count: int, wanted: int) -> np.ndarray:
    """Return the places of so many out of `count` things, in order and evenly spread."""
    return np.linspace(0, count - 1, wanted).astype(np.int64)
