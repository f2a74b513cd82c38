"""The surface of an object in an image, with less noise and up to the outline of its mask.

The box of a thousand points is decided by the wildest of them, and a mask that was eroded (against points of the
background) makes it too small. Both are mended in the image. On a plane, 1 / depth is affine in the pixel
coordinates: so around each pixel an affine function is fitted to 1 / depth. Its value there has a fraction of the
noise, and towards the outline it is continued over the pixels that erosion took, as far as the centres of the
outermost ones; going on to their outer sides would make boxes too large, for their extents are maxima.

Shape letters: H and W the image part around an object, B pixels on its outline.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

CREASE = 4.0
"""Where the squared misfit is so many times the usual one, two faces meet: a window of 3 x 3 pixels is used."""

MOST_CHANGE = 0.05
"""The outline is continued by at most this share of 1 / depth."""

AGREES = 0.006
"""A pixel that erosion took keeps its own point if 1 / depth is that of the surface up to this share."""

FEWEST = 6
"""An affine function of three numbers is fitted to so many pixels at least."""


def smooth_surface(
    points_HW3: np.ndarray, mask_HW: np.ndarray, keep_HW: np.ndarray, half_window: int, reach: int
) -> tuple[np.ndarray, np.ndarray]:
    """Smooth an object's points, and continue them to its outline.

    Args:
        points_HW3: Points of a pinhole camera with its axes along those of the image; finite where kept.
        mask_HW: bool, the whole object.
        keep_HW: bool, the pixels of it whose points are trusted.
        half_window: Pixels to each side of a pixel that its affine function is fitted to; at least 1.
        reach: Pixels over which the surface is continued: as many as erosion took. Those that were left out for
            other reasons are no part of the surface.

    Returns:
        float64 (N, 3) smoothed points of the kept pixels, and of those within reach that agree with them, row by
        row; and (B, 3) points that the surface is continued to at the other pixels of the outline within reach.
    """
    rays_u, rays_v = _rays(points_HW3, keep_HW)
    with np.errstate(divide="ignore", invalid="ignore"):
        measured_HW = 1 / points_HW3[..., 2].astype(np.float64)
    keep_HW = keep_HW | _agreeing(measured_HW, mask_HW, keep_HW, half_window, reach)
    fit = _fits(np.where(keep_HW, measured_HW, 0.0), keep_HW, half_window)
    rows, columns = np.nonzero(keep_HW)
    surface = _points(rays_u, rays_v, columns, rows, fit.value[rows, columns])
    rows, columns = np.nonzero(_border(mask_HW) & ~keep_HW)
    inverse, close = _continued(fit, keep_HW, rows, columns, reach)
    return surface, _points(rays_u, rays_v, columns[close], rows[close], inverse[close])


def _agreeing(
    measured_HW: np.ndarray, mask_HW: np.ndarray, keep_HW: np.ndarray, half_window: int, reach: int
) -> np.ndarray:
    """Return which pixels near the outline have a point of their own that continues the surface."""
    fit = _fits(np.where(keep_HW, measured_HW, 0.0), keep_HW, half_window)
    rows, columns = np.nonzero(mask_HW & ~keep_HW)
    inverse, close = _continued(fit, keep_HW, rows, columns, reach)
    agreeing_HW = np.zeros_like(mask_HW)
    agreeing_HW[rows, columns] = close & (np.abs(measured_HW[rows, columns] / inverse - 1) < AGREES)
    return agreeing_HW


class _Fits(NamedTuple):
    """Affine functions value + along_u du + along_v dv of 1 / depth around each pixel; (H, W) each."""

    value: np.ndarray
    along_u: np.ndarray
    along_v: np.ndarray


def _rays(points_HW3: np.ndarray, keep_HW: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the lines x / z = m u + b and y / z = m v + b, (m, b) each, that pixel coordinates follow."""
    rows, columns = np.nonzero(keep_HW)
    x, y, z = points_HW3[rows, columns].astype(np.float64).T
    return _line(columns, x / z), _line(rows, y / z)


def _line(place: np.ndarray, value: np.ndarray) -> np.ndarray:
    middle = place.mean()
    offset = place - middle
    slope = (offset * value).sum() / max((offset * offset).sum(), 1e-12)
    return np.array([slope, value.mean() - slope * middle])


def _points(
    rays_u: np.ndarray, rays_v: np.ndarray, u: np.ndarray, v: np.ndarray, inverse: np.ndarray
) -> np.ndarray:
    directions = np.stack([rays_u[0] * u + rays_u[1], rays_v[0] * v + rays_v[1], np.ones(len(u))], axis=1)
    return directions / inverse[:, None]


def _fits(inverse_HW: np.ndarray, keep_HW: np.ndarray, half_window: int) -> _Fits:
    """Return the fit of the wide window, or of 3 x 3 pixels where two faces meet.

    Where even these do not agree, that is no noise but an edge, and the value stays as it is.
    """
    wide, misfit_HW = _fit(inverse_HW, keep_HW, half_window)
    narrow, narrow_misfit_HW = _fit(inverse_HW, keep_HW, 1)
    limit = CREASE * float(np.median(misfit_HW[keep_HW])) + 1e-14
    crease_HW, edge_HW = misfit_HW > limit, narrow_misfit_HW > limit
    return _Fits(
        np.where(crease_HW, np.where(edge_HW, inverse_HW, narrow.value), wide.value),
        np.where(crease_HW, narrow.along_u, wide.along_u),
        np.where(crease_HW, narrow.along_v, wide.along_v),
    )


def _fit(inverse_HW: np.ndarray, keep_HW: np.ndarray, half: int) -> tuple[_Fits, np.ndarray]:
    """Fit an affine function around each kept pixel; return it and the mean squared misfit, relative."""
    from scipy import ndimage

    offsets = np.arange(-half, half + 1, dtype=np.float64)
    powers = [np.ones_like(offsets), offsets, offsets**2]

    def moment(values_HW: np.ndarray, u: int, v: int) -> np.ndarray:
        part = ndimage.correlate1d(values_HW, powers[u], axis=1, mode="constant")
        return ndimage.correlate1d(part, powers[v], axis=0, mode="constant")

    weight_HW = keep_HW.astype(np.float64)
    # Relative to the mean, so that squares lose no digits.
    level = float(inverse_HW[keep_HW].mean())
    values_HW = np.where(keep_HW, inverse_HW / level - 1, 0.0)
    count = moment(weight_HW, 0, 0)
    normal = [[moment(weight_HW, i[0] + j[0], i[1] + j[1]) for j in _AFFINE] for i in _AFFINE]
    right = [moment(values_HW, *i) for i in _AFFINE]
    matrix_HW33 = np.stack([np.stack(row, axis=-1) for row in normal], axis=-2)
    right_HW3 = np.stack(right, axis=-1)
    usable_HW = (count >= FEWEST) & (np.linalg.det(matrix_HW33) > 1e-6 * count**3)
    matrix_HW33[~usable_HW] = np.eye(3)
    solved_HW3 = np.linalg.solve(matrix_HW33, right_HW3[..., None])[..., 0]
    solved_HW3[~usable_HW] = 0
    # Too few around it: the pixel stays as it is.
    solved_HW3[..., 0] = np.where(usable_HW, solved_HW3[..., 0], values_HW)
    squares_HW = moment(values_HW**2, 0, 0) - (solved_HW3 * right_HW3).sum(-1)
    misfit_HW = np.where(usable_HW, np.maximum(squares_HW, 0) / np.maximum(count, 1), 0.0)
    value, along_u, along_v = np.moveaxis(solved_HW3, -1, 0)
    return _Fits(level * (1 + value), level * along_u, level * along_v), misfit_HW


_AFFINE = ((0, 0), (1, 0), (0, 1))
"""Powers of (du, dv) of the three terms."""


def _border(mask_HW: np.ndarray) -> np.ndarray:
    """Return the outermost pixels of a mask; the part of the image that is looked at is the mask's bounds."""
    from scipy import ndimage

    return mask_HW & ~ndimage.binary_erosion(mask_HW, np.ones((3, 3)))


def _continued(
    fit: _Fits, keep_HW: np.ndarray, rows: np.ndarray, columns: np.ndarray, reach: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return 1 / depth of the surface continued to pixels (B,), and which of them have a kept one within reach."""
    from scipy import ndimage

    kept = ndimage.distance_transform_edt(~keep_HW, return_distances=False, return_indices=True)
    near_row, near_column = kept[:, rows, columns]
    down, right = rows - near_row, columns - near_column
    value = fit.value[near_row, near_column]
    change = fit.along_u[near_row, near_column] * right + fit.along_v[near_row, near_column] * down
    inverse = value + np.clip(change, -MOST_CHANGE * value, MOST_CHANGE * value)
    return inverse, np.maximum(np.abs(down), np.abs(right)) <= reach
