"""The surface of an object in an image, with less noise and up to the outline of its mask.

The box of a thousand points is decided by the wildest of them, and a mask that was eroded (against points of the
background) makes it too small. Both are mended in the image. On a plane, 1 / depth is affine in the pixel
coordinates: so around each pixel an affine function is fitted to 1 / depth. Its value there has a fraction of the
noise, and towards the outline it is continued over the pixels that erosion took, as far as the centres of the
outermost ones; going on to their outer sides would make boxes too large, for their extents are maxima.

Shape letters: H and W the image part around an object, B pixels on its outline.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Literal, NamedTuple

import numpy as np

from spear_lightning.geometry.outliers import evenly

CREASE = 4.0
"""Where the squared misfit is so many times the usual one, two faces meet: a window of 3 x 3 pixels is used."""

MOST_CHANGE = 0.05
"""The outline is continued by at most this share of 1 / depth."""

AGREES = 0.006
"""A pixel that erosion took keeps its own point if 1 / depth is that of the surface up to this share."""

ON_RAYS = 512
"""Points by which the camera is known: all lie on its rays exactly, so that a few are as good as all."""

FEWEST = 6
"""An affine function of three numbers is fitted to so many pixels at least."""


def smooth_surface(
    points_HW3: np.ndarray,
    mask_HW: np.ndarray,
    keep_HW: np.ndarray,
    half_window: int,
    reach: int,
    max_points: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Smooth an object's points, and continue them to its outline.

    Args:
        points_HW3: Points of a pinhole camera with its axes along those of the image; finite where kept.
        mask_HW: bool, the whole object.
        keep_HW: bool, the pixels of it whose points are trusted.
        half_window: Pixels to each side of a pixel that its affine function is fitted to; at least 1.
        reach: Pixels over which the surface is continued: as many as erosion took. Those that were left out for
            other reasons are no part of the surface.
        max_points: About so many smoothed points are returned at most, and those at the border of what is kept.

    Returns:
        float64 (N, 3) smoothed points of kept pixels, and of those within reach that agree with them, row by
        row; and (B, 3) points that the surface is continued to at the other pixels of the outline within reach.
    """
    rays_u, rays_v = _rays(points_HW3, keep_HW)
    with np.errstate(divide="ignore", invalid="ignore"):
        measured_HW = 1 / points_HW3[..., 2].astype(np.float64)
    keep_HW = keep_HW | _agreeing(measured_HW, mask_HW, keep_HW, half_window, reach)
    shown_HW = _thinned(keep_HW, max_points)
    rows, columns = np.nonzero(mask_HW & ~eroded(mask_HW) & ~keep_HW)
    near, found = _nearest_kept(keep_HW, rows, columns, reach)
    wanted_HW = shown_HW.copy()
    wanted_HW[near] = True
    fit = _fits(measured_HW, keep_HW, half_window, wanted_HW)
    inverse = _continued(fit, near, rows[found], columns[found])
    outline = _points(rays_u, rays_v, columns[found], rows[found], inverse)
    rows, columns = np.nonzero(shown_HW)
    return _points(rays_u, rays_v, columns, rows, fit.value[rows, columns]), outline


def eroded(mask_HW: np.ndarray, pixels: int = 1, beyond: Literal["constant", "edge"] = "constant") -> np.ndarray:
    """Return a mask without its outermost pixels; beyond the bounds there is nothing, or what is at their edge."""
    for _ in range(pixels):
        padded_HW = np.pad(mask_HW, 1, mode=beyond)
        rows_HW = padded_HW[:-2] & padded_HW[1:-1] & padded_HW[2:]
        mask_HW = rows_HW[:, :-2] & rows_HW[:, 1:-1] & rows_HW[:, 2:]
    return mask_HW


def _thinned(keep_HW: np.ndarray, max_points: int) -> np.ndarray:
    """Return about so many of the kept pixels at most, in some rows and columns, and all those on the border."""
    inner_HW = eroded(keep_HW)
    step = math.ceil(math.sqrt(np.count_nonzero(inner_HW) / max_points))
    if step < 2:
        return keep_HW
    shown_HW = keep_HW & ~inner_HW
    shown_HW[::step, ::step] |= inner_HW[::step, ::step]
    return shown_HW


def _agreeing(
    measured_HW: np.ndarray, mask_HW: np.ndarray, keep_HW: np.ndarray, half_window: int, reach: int
) -> np.ndarray:
    """Return which pixels near the outline have a point of their own that continues the surface."""
    rows, columns = np.nonzero(mask_HW & ~keep_HW)
    near, found = _nearest_kept(keep_HW, rows, columns, reach)
    agreeing_HW = np.zeros_like(mask_HW)
    if len(found):
        wanted_HW = np.zeros_like(mask_HW)
        wanted_HW[near] = True
        rows, columns = rows[found], columns[found]
        inverse = _continued(_fits(measured_HW, keep_HW, half_window, wanted_HW), near, rows, columns)
        agreeing_HW[rows, columns] = np.abs(measured_HW[rows, columns] / inverse - 1) < AGREES
    return agreeing_HW


class _Fits(NamedTuple):
    """Affine functions value + along_u du + along_v dv of 1 / depth around each pixel; (H, W) each."""

    value: np.ndarray
    along_u: np.ndarray
    along_v: np.ndarray


def _rays(points_HW3: np.ndarray, keep_HW: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the lines x / z = m u + b and y / z = m v + b, (m, b) each, that pixel coordinates follow."""
    kept = np.flatnonzero(keep_HW)
    rows, columns = np.divmod(kept[evenly(len(kept), min(len(kept), ON_RAYS))], keep_HW.shape[1])
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


def _fits(inverse_HW: np.ndarray, keep_HW: np.ndarray, half_window: int, wanted_HW: np.ndarray) -> _Fits:
    """Return the fit of the wide window, or of 3 x 3 pixels where two faces meet; zero where it is not wanted.

    Where even these do not agree, that is no noise but an edge, and the value stays as it is.
    """
    # Relative to the mean, so that squares lose no digits.
    level = float(inverse_HW[keep_HW].mean())
    values_HW = np.zeros(keep_HW.shape)
    values_HW[keep_HW] = inverse_HW[keep_HW] / level - 1
    wanted = np.flatnonzero(wanted_HW)
    fit, misfit = _fit(values_HW, keep_HW, half_window, wanted)
    limit = CREASE * float(np.median(misfit)) + 1e-14
    (crease,) = np.nonzero(misfit > limit)
    if len(crease):
        narrow, narrow_misfit = _fit(values_HW, keep_HW, 1, wanted[crease])
        narrow[0] = np.where(narrow_misfit > limit, values_HW.ravel()[wanted[crease]], narrow[0])
        fit[:, crease] = narrow
    fit_3HW = np.zeros((3, *keep_HW.shape))
    fit_3HW[:, wanted_HW] = level * fit
    fit_3HW[0, wanted_HW] += level
    return _Fits(*fit_3HW)


def _fit(
    values_HW: np.ndarray, keep_HW: np.ndarray, half: int, wanted: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Fit an affine function around wanted pixels (N,), numbered row by row, to the kept ones; others are zero.

    Returns:
        (3, N) value, slope along u and v; and the mean squared misfit (N,).
    """
    basis_6K = _basis(half)
    weights_KN, values_KN = _windows(keep_HW.astype(np.float64), half, wanted), _windows(values_HW, half, wanted)
    count, sum_u, sum_v, sum_uu, sum_uv, sum_vv = basis_6K @ weights_KN
    right = basis_6K[:3] @ values_KN
    # Normal equations with the mean taken out: two by two.
    usable = count >= FEWEST
    share = 1 / np.maximum(count, 1)
    uu = sum_uu - sum_u * sum_u * share
    vv = sum_vv - sum_v * sum_v * share
    uv = sum_uv - sum_u * sum_v * share
    determinant = uu * vv - uv * uv
    usable &= determinant > 1e-6 * count * count
    mean = right[0] * share
    right_u, right_v = right[1] - sum_u * mean, right[2] - sum_v * mean
    inverse = usable / np.where(usable, determinant, 1)
    along_u = (vv * right_u - uv * right_v) * inverse
    along_v = (uu * right_v - uv * right_u) * inverse
    # Too few around it: the pixel stays as it is.
    value = np.where(usable, mean - (along_u * sum_u + along_v * sum_v) * share, values_HW.ravel()[wanted])
    fit = np.stack([value, along_u, along_v])
    squares = np.einsum("kn,kn->n", values_KN, values_KN) - (fit * right).sum(0)
    return fit, np.where(usable, np.maximum(squares, 0) * share, 0.0)


@cache
def _basis(half: int) -> np.ndarray:
    """Return 1, du, dv, du du, du dv, dv dv (6, K) at the pixels of a window, row by row."""
    dv, du = np.mgrid[-half : half + 1, -half : half + 1].reshape(2, -1).astype(np.float64)
    return np.stack([np.ones_like(du), du, dv, du * du, du * dv, dv * dv])


def _windows(values_HW: np.ndarray, half: int, wanted: np.ndarray) -> np.ndarray:
    """Return the values (K, N) of the pixels in windows around the wanted ones; zero beyond the bounds."""
    rows, columns = np.divmod(wanted, values_HW.shape[1])
    padded_HW = np.pad(values_HW, half)
    line, steps = padded_HW.shape[1], np.arange(2 * half + 1)
    offsets = (steps[:, None] * line + steps).ravel()
    return padded_HW.ravel().take(offsets[:, None] + (rows * line + columns))


def _nearest_kept(
    keep_HW: np.ndarray, rows: np.ndarray, columns: np.ndarray, reach: int
) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray]:
    """Return the kept pixels, rows (F,) and columns (F,), nearest to those of pixels (B,) with one within reach.

    Also which of the pixels have one, as their numbers (F,).
    """
    padded_HW = np.pad(keep_HW, reach)
    near_row, near_column = np.full((2, len(rows)), -1)
    steps = sorted(
        ((down, right) for down in range(-reach, reach + 1) for right in range(-reach, reach + 1)), key=_length
    )
    for down, right in steps:
        (found,) = np.nonzero((near_row < 0) & padded_HW[rows - down + reach, columns - right + reach])
        near_row[found], near_column[found] = rows[found] - down, columns[found] - right
    (found,) = np.nonzero(near_row >= 0)
    return (near_row[found], near_column[found]), found


def _continued(
    fit: _Fits, near: tuple[np.ndarray, np.ndarray], rows: np.ndarray, columns: np.ndarray
) -> np.ndarray:
    """Return 1 / depth of the surface (F,) continued from pixels near others to these."""
    value = fit.value[near]
    change = fit.along_u[near] * (columns - near[1]) + fit.along_v[near] * (rows - near[0])
    return value + np.clip(change, -MOST_CHANGE * value, MOST_CHANGE * value)


def _length(step: tuple[int, int]) -> int:
    return step[0] ** 2 + step[1] ** 2
