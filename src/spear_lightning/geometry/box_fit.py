"""From a cloud of points to an oriented box: outliers out, convex hull, smallest box around it.

scipy (extra `label`) gives the neighbour search and the hull. The search for the smallest box follows O'Rourke
("Finding minimal enclosing boxes", 1985) restricted to boxes with one face on a face of the hull: for each hull
face, the smallest rectangle around the hull's shadow on it has a side along an edge of the shadow's outline.
That is exact for boxes and for most of what stands on a table; a regular tetrahedron gets twice its optimum, as
with trimesh.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch

from spear_lightning.errors import DataError
from spear_lightning.geometry import quaternions
from spear_lightning.geometry.oriented_boxes import OrientedBox, canonical_axes, reference_axes

MIN_POINTS = 4
"""Fewer points say nothing about a box."""

ALMOST_SMALLEST = 1.15
"""Boxes up to this many times the least volume are compared by more than their volume."""

SLANTED = 4.0
"""Points this many times sparser than usual may still be a surface seen at a grazing angle."""

SAME = 0.01
"""Frames whose axes differ by less are not compared."""

CANDIDATES = 1000
"""Boxes that are compared so, at most."""

SUPPORT_POINTS = 256
"""Points by which it is judged whether a box has its faces where the points are."""

UPRIGHT = 0.03
"""Share of volume that a box may be larger for each unit of alignment (trace) with the reference frame.

Tilting an exact box by a small angle costs at least twice that angle in volume and gains at most twice that
angle in alignment, so any weight well below one leaves boxes alone, and decides only where volume and support do
not care.
"""

MAX_HULL = 192
"""Hull vertices above which the search looks at fewer of them: it grows with their number to the power 2.5."""

DIRECTIONS = 512
"""Directions in which the extreme points of such a hull are kept; they are about 9 degrees apart."""

EDGE_ON = 1e-9
"""Cosines and relative lengths below this are zero."""

CHUNK = 1 << 21
"""Projections computed at a time: 16 MB."""


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
    from scipy.spatial import cKDTree

    count = len(points_N3)
    keep = np.zeros(count, bool)
    chosen = np.arange(count) if count <= max_points else np.linspace(0, count - 1, max_points).astype(np.int64)
    if len(chosen) <= neighbours:
        keep[chosen] = True
        return keep
    points = points_N3[chosen]
    # The nearest neighbour of a point is the point itself.
    distances, _ = cKDTree(points).query(points, k=neighbours + 1)
    spacing = np.log(np.maximum(distances[:, 1:].mean(1), np.finfo(np.float64).tiny))
    middle = np.median(spacing)
    spread = 1.4826 * np.median(np.abs(spacing - middle))
    keep[chosen] = spacing <= middle + np.maximum(ratio * spread, math.log(SLANTED))
    return keep


def fit_box(points_N3: np.ndarray, min_extent: float = 1e-3) -> OrientedBox:
    """Return the box of least volume around points, in the canonical frame.

    Where volume hardly decides, two more things do. A camera often sees two faces of a box alone; then a box
    laid along the diagonal is as small as the right one, but the points are not on its faces. And the box of a
    ball, a cylinder or a noisy cube has no best orientation: the one closest to the reference frame of
    `oriented_boxes` is taken, so that like objects get like boxes. The score is log volume + mean distance of
    points from the box's surface / cube root of the volume - `UPRIGHT` x alignment.

    Args:
        points_N3: (N, 3) points in the camera frame, any unit of length.
        min_extent: Least edge length, in that unit: flat objects, and those of which one face is seen, get it.

    Returns:
        One box: centre (3,), float64.

    Raises:
        DataError: If there are fewer than four points, or some are not finite.
    """
    points = np.asarray(points_N3, np.float64)
    if len(points) < MIN_POINTS or not np.isfinite(points).all():
        raise DataError(
            "No box can be fitted to these points",
            where="fit_box",
            found=f"{len(points)} points, {int((~np.isfinite(points)).any(-1).sum())} of them not finite",
            expected=f"at least {MIN_POINTS} finite points",
            remedy="leave out the pixels without geometry, and objects that are too small",
        )
    middle = points.mean(0)
    hull = _hull(points - middle, min_extent)
    axes, extents = _candidates(hull, min_extent)
    best = canonical_axes(torch.from_numpy(_best(axes, extents, hull.vertices, points - middle)))
    local = hull.points @ best.numpy()
    low, high = local.min(0), local.max(0)
    centre = middle + best.numpy() @ (low + high) / 2
    return OrientedBox(
        torch.from_numpy(centre),
        quaternions.from_matrix(best),
        torch.from_numpy(np.maximum(high - low, min_extent)),
    )


class _Hull(NamedTuple):
    """A convex hull.

    Attributes:
        points: (P, 3) its vertices.
        vertices: (V, 3) those that the search looks at.
        normals: (F, 3) outward unit normals of the triangles between them.
        edges: (E, 3) edges of the triangles.
        sides: (E, 2) the two triangles of each edge.
    """

    points: np.ndarray
    vertices: np.ndarray
    normals: np.ndarray
    edges: np.ndarray
    sides: np.ndarray


def _hull(points: np.ndarray, min_extent: float) -> _Hull:
    from scipy.spatial import ConvexHull, QhullError

    try:
        hull = ConvexHull(points)
    except QhullError:
        # Points on a plane, a line or one point: thickened by a hair along their thin directions.
        hull = ConvexHull(_thickened(points, 1e-3 * min_extent))
    outer = hull.points[hull.vertices]
    if len(outer) > MAX_HULL:
        hull = ConvexHull(_extremes(outer))
    corners = hull.points[hull.simplices]
    # Triangle i's neighbour k is opposite its corner k; each edge is taken from the triangle of lower number.
    triangle, corner = np.nonzero(hull.neighbors > np.arange(len(corners))[:, None])
    edges = corners[triangle, (corner + 1) % 3] - corners[triangle, (corner + 2) % 3]
    sides = np.stack([triangle, hull.neighbors[triangle, corner]], axis=1)
    return _Hull(outer, hull.points[hull.vertices], hull.equations[:, :3], edges, sides)


def _candidates(hull: _Hull, min_extent: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the frames (M, 3, 3), axes in columns, of all boxes that lie on a face and an outline's edge.

    Also their extents (M, 3), at least `min_extent`.
    """
    facing = hull.normals @ hull.normals.T
    first, second = facing[:, hull.sides[:, 0]], facing[:, hull.sides[:, 1]]
    # An edge is on the outline of the shadow if one of its faces looks towards the light and the other away.
    outline = (np.minimum(first, second) <= EDGE_ON) & (np.maximum(first, second) >= -EDGE_ON)
    face, edge = np.nonzero(outline)
    normal = hull.normals[face]
    along = hull.edges[edge]
    along = along - (along * normal).sum(-1, keepdims=True) * normal
    length = np.linalg.norm(along, axis=-1)
    usable = length > EDGE_ON * np.linalg.norm(hull.edges, axis=-1).max()
    along, normal, face = along[usable] / length[usable, None], normal[usable], face[usable]
    across = np.cross(normal, along)
    heights = hull.normals @ hull.vertices.T
    extents = np.empty((len(face), 3))
    extents[:, 2] = np.ptp(heights, axis=1)[face]
    step = max(CHUNK // len(hull.vertices), 1)
    for start in range(0, len(face), step):
        rows = slice(start, start + step)
        extents[rows, 0] = np.ptp(along[rows] @ hull.vertices.T, axis=1)
        extents[rows, 1] = np.ptp(across[rows] @ hull.vertices.T, axis=1)
    return np.stack([along, across, normal], axis=-1), np.maximum(extents, min_extent)


def _best(axes: np.ndarray, extents: np.ndarray, hull: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Return the frame (3, 3) with the least score (see `fit_box`) of frames (M, 3, 3) with extents (M, 3)."""
    volumes = extents.prod(-1)
    chosen = np.flatnonzero(volumes <= volumes.min() * ALMOST_SMALLEST)
    chosen = chosen[np.argsort(volumes[chosen], kind="stable")]
    upright = canonical_axes(torch.from_numpy(axes[chosen]))
    # A flat face of the hull is many triangles, which all propose the same box.
    different = np.sort(_first_of_each(upright.numpy()))[:CANDIDATES]
    chosen, upright = chosen[different], upright[torch.from_numpy(different)]
    axes, extents, volumes = axes[chosen], extents[chosen], volumes[chosen]
    points = points[np.linspace(0, len(points) - 1, min(len(points), SUPPORT_POINTS)).astype(np.int64)]
    # Local coordinates (M, 3, S) and, per axis, the distance from the nearer of the two faces across it.
    frames = axes.transpose(0, 2, 1)
    local, outer = frames @ points.T, frames @ hull.T
    middle = (outer.min(-1) + outer.max(-1)) / 2
    depth = extents[..., None] / 2 - np.abs(local - middle[..., None])
    support = np.abs(depth).min(1).mean(-1) / np.cbrt(volumes)
    alignment = (upright * reference_axes(upright)).sum((-1, -2)).numpy()
    return axes[(np.log(volumes) + support - UPRIGHT * alignment).argmin()]


def _first_of_each(frames: np.ndarray) -> np.ndarray:
    """Return the place of the first of all frames (M, 3, 3) that are the same to about half a degree."""
    steps = np.rint(frames[:, :, :2].reshape(-1, 6) / SAME).astype(np.int64) + round(1 / SAME)
    keys = steps @ (2 * round(1 / SAME) + 1) ** np.arange(6)
    return np.unique(keys, return_index=True)[1]


def _thickened(points: np.ndarray, thickness: float) -> np.ndarray:
    _, singular, directions = np.linalg.svd(points, full_matrices=False)
    size = max(float(singular[0]), thickness)
    thin = directions[singular < 1e-6 * size] if singular[0] > 0 else np.eye(3)
    step = max(thickness, 1e-6 * size)
    shifts = [points] + [points + sign * step * direction for direction in thin for sign in (-1.0, 1.0)]
    return np.concatenate(shifts)


def _extremes(vertices: np.ndarray) -> np.ndarray:
    """Return the hull vertices that are farthest in one of many directions (a Fibonacci lattice)."""
    index = np.arange(DIRECTIONS)
    height = 1 - (2 * index + 1) / DIRECTIONS
    turn = index * math.pi * (3 - math.sqrt(5))
    radius = np.sqrt(1 - height**2)
    directions = np.stack([radius * np.cos(turn), radius * np.sin(turn), height], axis=1)
    return vertices[np.unique((directions @ vertices.T).argmax(1))]
