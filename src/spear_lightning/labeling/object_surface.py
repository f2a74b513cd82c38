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
    # Relative to the mean, so that squares lose no digits.
    level = float(inverse_HW[keep_HW].mean())
    values_HW = np.where(keep_HW, inverse_HW / level - 1, 0.0)
    kept = np.flatnonzero(keep_HW)
    fit, misfit = _fit(values_HW, keep_HW, half_window, kept)
    limit = CREASE * float(np.median(misfit)) + 1e-14
    (crease,) = np.nonzero(misfit > limit)
    if len(crease):
        narrow, narrow_misfit = _fit(values_HW, keep_HW, 1, kept[crease])
        narrow[0] = np.where(narrow_misfit > limit, values_HW.ravel()[kept[crease]], narrow[0])
        fit[:, crease] = narrow
    fit_3HW = np.zeros((3, *keep_HW.shape))
    fit_3HW[:, keep_HW] = level * fit
    fit_3HW[0, keep_HW] += level
    return _Fits(*fit_3HW)


def _fit(
    values_HW: np.ndarray, keep_HW: np.ndarray, half: int, wanted: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Fit an affine function around wanted pixels (N,), numbered row by row, to the kept ones; others are zero.

    Returns:
        (3, N) value, slope along u and v; and the mean squared misfit (N,).
    """
    weights = _moments(keep_HW.astype(np.float64), half, wanted, 2)
    count, sum_u, sum_v = weights[0, 0], weights[1, 0], weights[0, 1]
    firsts = _moments(values_HW, half, wanted, 1)
    right = np.stack([firsts[0, 0], firsts[1, 0], firsts[0, 1]])
    # Normal equations with the mean taken out: two by two.
    usable = count >= FEWEST
    share = 1 / np.maximum(count, 1)
    uu = weights[2, 0] - sum_u * sum_u * share
    vv = weights[0, 2] - sum_v * sum_v * share
    uv = weights[1, 1] - sum_u * sum_v * share
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
    squares = _moments(values_HW**2, half, wanted, 0)[0, 0] - (fit * right).sum(0)
    return fit, np.where(usable, np.maximum(squares, 0) * share, 0.0)


def _moments(
    values_HW: np.ndarray, half: int, wanted: np.ndarray, order: int
) -> dict[tuple[int, int], np.ndarray]:
    """Return the sums of values x du^i dv^j, i + j <= order, over a window around each wanted pixel."""
    from scipy import ndimage

    offsets = np.arange(-half, half + 1, dtype=np.float64)
    sums = {}
    for i in range(order + 1):
        part_HW = ndimage.correlate1d(values_HW, offsets**i, axis=1, mode="constant")
        for j in range(order + 1 - i):
            both_HW = ndimage.correlate1d(part_HW, offsets**j, axis=0, mode="constant")
            sums[i, j] = both_HW.ravel()[wanted]
    return sums


def _border(mask_HW: np.ndarray) -> np.ndarray:
    """Return the outermost pixels of a mask; the part of the image that is looked at is the mask's bounds."""
    from scipy import ndimage

    return mask_HW & ~ndimage.binary_erosion(mask_HW, np.ones((3, 3)))


def _continued(
    fit: _Fits, keep_HW: np.ndarray, rows: np.ndarray, columns: np.ndarray, reach: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return 1 / depth of the surface continued to pixels (B,), and which of them have a kept one within reach.

    It is continued from the nearest kept pixel.
    """
    padded_HW = np.pad(keep_HW, reach)
    inverse, close = np.full(len(rows), np.nan), np.zeros(len(rows), bool)
    steps = sorted(
        ((down, right) for down in range(-reach, reach + 1) for right in range(-reach, reach + 1)), key=_length
    )
    for down, right in steps:
        (found,) = np.nonzero(~close & padded_HW[rows - down + reach, columns - right + reach])
        near = rows[found] - down, columns[found] - right
        value = fit.value[near]
        change = fit.along_u[near] * right + fit.along_v[near] * down
        inverse[found] = value + np.clip(change, -MOST_CHANGE * value, MOST_CHANGE * value)
        close[found] = True
    return inverse, close


def _length(step: tuple[int, int]) -> int:
    return step[0] ** 2 + step[1] ** 2
