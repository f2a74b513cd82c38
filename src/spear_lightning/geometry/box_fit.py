"""From a cloud of points to an oriented box: convex hull, smallest box around it.

scipy (extra `label`) gives the hull. The search for the smallest box follows O'Rourke
("Finding minimal enclosing boxes", 1985) restricted to boxes with one face on a face of the hull: for each hull
face, the smallest rectangle around the hull's shadow on it has a side along an edge of the shadow's outline.
That is exact for boxes and for most of what stands on a table; a regular tetrahedron gets twice its optimum, as
with trimesh.
"""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from spear_lightning.errors import DataError
from spear_lightning.geometry import quaternions
from spear_lightning.geometry.oriented_boxes import OrientedBox, canonical_axes, reference_axes
from spear_lightning.geometry.outliers import evenly

if TYPE_CHECKING:
    from scipy.spatial import ConvexHull

MIN_POINTS = 4
"""Fewer points say nothing about a box."""

ALMOST_SMALLEST = 1.15
"""Boxes up to this many times the least volume are compared by more than their volume."""

SAME = 0.01
"""Frames whose axes differ by less are not compared."""

CANDIDATES = 500
"""Boxes that are compared so, at most."""

SUPPORT_POINTS = 256
"""Points by which it is judged whether a box has its faces where the points are."""

UPRIGHT = 0.03
"""Share of volume that a box may be larger for each unit of alignment (trace) with the reference frame.

Tilting an exact box by a small angle costs at least twice that angle in volume and gains at most twice that
angle in alignment, so any weight well below one leaves boxes alone, and decides only where volume and support do
not care.
"""

MAX_HULL = 128
"""Hull vertices above which the search looks at fewer of them: it grows with their number to the power 2.5."""

DIRECTIONS = 256
"""Directions in which the extreme points of such a hull are kept; they are about 13 degrees apart."""

SURELY_MANY = 4 * MAX_HULL
"""If so many stick out of the hull of those extreme in `DIRECTIONS`, the hull of all has too many vertices."""

MANY = 300
"""Clouds of more points are thinned before their hull is made."""

FEW_DIRECTIONS = (16, 64)
"""In these numbers of directions extreme points are sought first."""

NEGLIGIBLE = 1e-5
"""Points that stick out by less than this share of a cloud's radius say nothing about its orientation."""

EDGE_ON = 1e-9
"""Cosines and relative lengths below this are zero."""

FACES = 16
"""Faces of the hull that are looked at together."""

TOGETHER = 16
"""Directions and planes to which all points are compared at a time, so that the results stay in the cache."""


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
    local_3N = best.numpy().T @ (points - middle).T
    low, high = local_3N.min(1), local_3N.max(1)
    centre = middle + best.numpy() @ (low + high) / 2
    return OrientedBox(
        torch.from_numpy(centre),
        quaternions.from_matrix(best),
        torch.from_numpy(np.maximum(high - low, min_extent)),
    )


class _Hull(NamedTuple):
    """A convex hull.

    Attributes:
        vertices: (V, 3) its vertices.
        normals: (F, 3) outward unit normals of the triangles between them.
        areas: (F,) of the triangles.
        edges: (E, 2, 3) ends of the triangles' edges.
        sides: (E, 2) the two triangles of each edge.
    """

    vertices: np.ndarray
    normals: np.ndarray
    areas: np.ndarray
    edges: np.ndarray
    sides: np.ndarray


def _hull(points: np.ndarray, min_extent: float) -> _Hull:
    from scipy.spatial import ConvexHull, QhullError

    try:
        hull = _hull_of_many(points) if len(points) > MANY else ConvexHull(points)
    except QhullError:
        # Points on a plane, a line or one point: thickened by a hair along their thin directions.
        hull = ConvexHull(_thickened(points, 1e-3 * min_extent))
    if len(hull.vertices) > MAX_HULL:
        hull = ConvexHull(hull.points[_extremes(hull.points, DIRECTIONS)])
    corners = hull.points[hull.simplices]
    # Triangle i's neighbour k is opposite its corner k; each edge is taken from the triangle of lower number.
    triangle, corner = np.nonzero(hull.neighbors > np.arange(len(corners))[:, None])
    edges = np.stack([corners[triangle, (corner + 1) % 3], corners[triangle, (corner + 2) % 3]], axis=1)
    sides = np.stack([triangle, hull.neighbors[triangle, corner]], axis=1)
    spans = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    areas = np.linalg.norm(spans, axis=-1) / 2
    return _Hull(hull.points[hull.vertices], hull.equations[:, :3], areas, edges, sides)


def _hull_of_many(points: np.ndarray) -> ConvexHull:
    """Return the hull of points, or of those extreme in `DIRECTIONS` if that has more than `MAX_HULL` vertices.

    What is inside the hull of a few extreme points is left out before more are sought.
    """
    from scipy.spatial import ConvexHull

    margin = NEGLIGIBLE * float(np.abs(points).max())
    for directions in (*FEW_DIRECTIONS, DIRECTIONS):
        extreme = _extremes(points, directions)
        hull = ConvexHull(points[extreme])
        if len(hull.vertices) > MAX_HULL:
            return hull
        outside = _heights(points, hull.equations) > margin
        outside[extreme] = True
        points = points[outside]
    if len(points) > SURELY_MANY:
        return hull
    return ConvexHull(points)


def _candidates(hull: _Hull, min_extent: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the frames (M, 3, 3), axes in columns, of boxes that lie on a face and an outline's edge.

    Those of at most `ALMOST_SMALLEST` times the least volume are all among them: no box on a face is smaller than
    the prism over its shadow, and faces are gone through in the order of their prisms. Also extents (M, 3), at
    least `min_extent`.
    """
    facing = hull.normals @ hull.normals.T
    heights = np.maximum(np.ptp(hull.normals @ hull.vertices.T, axis=1), min_extent)
    prisms = heights * (np.abs(facing) @ hull.areas) / 2
    first, second = facing[:, hull.sides[:, 0]], facing[:, hull.sides[:, 1]]
    # An edge is on the outline of the shadow if one of its faces looks towards the light and the other away.
    outline = (np.minimum(first, second) <= EDGE_ON) & (np.maximum(first, second) >= -EDGE_ON)
    order, best = np.argsort(prisms, kind="stable"), math.inf
    found = []
    for start in range(0, len(order), FACES):
        faces = order[start : start + FACES]
        faces = faces[prisms[faces] <= ALMOST_SMALLEST * best]
        if not len(faces):
            break
        axes, extents = _boxes_on(hull, faces, outline[faces], heights[faces], min_extent)
        best = min(best, float(extents.prod(-1).min(initial=math.inf)))
        found.append((axes, extents))
    return np.concatenate([axes for axes, _ in found]), np.concatenate([extents for _, extents in found])


def _boxes_on(
    hull: _Hull, faces: np.ndarray, outline: np.ndarray, heights: np.ndarray, min_extent: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return frames and extents of the boxes on faces (G,) and the edges of their outlines, bool (G, E)."""
    counts = outline.sum(1)
    # Each row has the edges of an outline, and after them its first edge again and again.
    places = np.arange(counts.max())
    edges = np.argsort(~outline, axis=1, kind="stable")[:, : len(places)]
    used = places < counts[:, None]
    edges = np.where(used, edges, edges[:, :1])
    ends = hull.edges[edges]
    normals = hull.normals[faces][:, None]
    along = ends[:, :, 0] - ends[:, :, 1]
    along = along - (along * normals).sum(-1, keepdims=True) * normals
    length = np.linalg.norm(along, axis=-1, keepdims=True)
    used &= length[..., 0] > EDGE_ON * np.abs(hull.vertices).max()
    along = along / np.where(length > 0, length, 1)
    across = np.cross(normals, along)
    # The outline's own vertices are the farthest in any direction along the face.
    outer = ends.transpose(0, 3, 1, 2).reshape(len(faces), 3, -1)
    axes = np.stack([along, across, np.broadcast_to(normals, along.shape)], axis=-1)
    extents = [np.ptp(along @ outer, axis=-1), np.ptp(across @ outer, axis=-1)]
    extents.append(np.broadcast_to(heights[:, None], used.shape))
    return axes[used], np.maximum(np.stack(extents, axis=-1)[used], min_extent)


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
    points = points[evenly(len(points), min(len(points), SUPPORT_POINTS))]
    # Local coordinates (3M, S) and, per axis, the distance from the nearer of the two faces across it.
    frames = axes.transpose(0, 2, 1).reshape(-1, 3).astype(np.float32)
    local, outer = frames @ points.T.astype(np.float32), frames @ hull.T.astype(np.float32)
    local -= ((outer.min(-1) + outer.max(-1)) / 2)[:, None]
    depth = np.abs(np.abs(local) - extents.reshape(-1, 1).astype(np.float32) / 2)
    support = depth.reshape(len(axes), 3, -1).min(1).mean(-1) / np.cbrt(volumes)
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


def _extremes(points: np.ndarray, directions: int) -> np.ndarray:
    """Return the numbers of the points that are farthest in one of so many directions."""
    points_3N = points.T.astype(np.float32)
    wanted = _lattice(directions).astype(np.float32)
    parts = range(0, directions, TOGETHER)
    return np.unique(np.concatenate([(wanted[part : part + TOGETHER] @ points_3N).argmax(1) for part in parts]))


def _heights(points: np.ndarray, facets: np.ndarray) -> np.ndarray:
    """Return how far points (N, 3) are above the highest of the planes (F, 4) normal . p + offset = 0."""
    points_3N, planes = points.T.astype(np.float32), facets.astype(np.float32)
    highest = np.full(len(points), -np.inf, np.float32)
    for part in range(0, len(planes), TOGETHER):
        some = planes[part : part + TOGETHER]
        np.maximum(highest, (some[:, :3] @ points_3N + some[:, 3:]).max(0), out=highest)
    return highest


@cache
def _lattice(count: int) -> np.ndarray:
    """Return directions (count, 3) spread evenly over the sphere (a Fibonacci lattice)."""
    index = np.arange(count)
    height = 1 - (2 * index + 1) / count
    turn = index * math.pi * (3 - math.sqrt(5))
    radius = np.sqrt(1 - height**2)
    return np.stack([radius * np.cos(turn), radius * np.sin(turn), height], axis=1)
