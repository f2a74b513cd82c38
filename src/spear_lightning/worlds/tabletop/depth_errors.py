"""Errors of a monocular geometry model, put on exact points: so that a labelling pipeline can meet the truth.

A network such as MoGe gives points up to one factor for the whole image (version 1), a little too near or too far
in patches, and smeared over the edges between near and far; a few are wild. Pixels stay where they are: a wrong
point lies on the ray of the right one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

EDGE = 0.02
"""A pixel lies at an edge if the depths around it differ by more than this share of its own."""


@dataclass(frozen=True)
class DepthErrors:
    """How large the errors are; the defaults are none.

    Attributes:
        scale: Least and greatest factor of the whole image; its logarithm is uniform in between.
        noise: Standard deviation of the relative error of depth.
        patch_pixels: How far neighbouring errors resemble each other (standard deviation of a Gaussian); 0: not.
        edge_mixing: Share of pixels at an edge whose depth is a mixture of the nearest and the furthest depth
            within one pixel of it.
        outliers: Share of pixels whose depth is wild: between half and twice the true one.
    """

    scale: tuple[float, float] = (1.0, 1.0)
    noise: float = 0.0
    patch_pixels: float = 0.0
    edge_mixing: float = 0.0
    outliers: float = 0.0


LIKE_MOGE = DepthErrors(scale=(0.3, 3.0), noise=0.01, patch_pixels=4.0, edge_mixing=0.7, outliers=0.002)
"""The kinds of error MoGe makes. The sizes are chosen, not measured: near objects to about one per cent."""


def disturbed(points_HW3: np.ndarray, errors: DepthErrors, rng: np.random.Generator) -> tuple[np.ndarray, float]:
    """Put errors on exact points.

    Args:
        points_HW3: Points in the camera frame; not finite where nothing is.
        errors: How large.
        rng: Draws them.

    Returns:
        The points with errors, float32, and the factor that the whole image was scaled by.
    """
    depth_HW = points_HW3[..., 2]
    known_HW = np.isfinite(depth_HW)
    low, high = np.log(errors.scale)
    scale = float(np.exp(rng.uniform(low, high)))
    factor_HW = _mixing(depth_HW, known_HW, errors.edge_mixing, rng)
    factor_HW *= np.exp(errors.noise * _correlated(depth_HW.shape, errors.patch_pixels, rng))
    wild_HW = rng.random(depth_HW.shape) < errors.outliers
    factor_HW = np.where(wild_HW, np.exp2(rng.uniform(-1, 1, depth_HW.shape)), factor_HW)
    result = np.array(points_HW3, np.float32)
    result[known_HW] *= (scale * factor_HW[known_HW, None]).astype(np.float32)
    return result, scale


def _mixing(depth_HW: np.ndarray, known_HW: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    from scipy import ndimage

    near_HW = ndimage.minimum_filter(np.where(known_HW, depth_HW, np.inf), 3)
    far_HW = ndimage.maximum_filter(np.where(known_HW, depth_HW, -np.inf), 3)
    mixed_HW = known_HW & (rng.random(depth_HW.shape) < share)
    weight_HW = rng.random(depth_HW.shape)
    factor_HW = np.ones(depth_HW.shape)
    mixed_HW[mixed_HW] = (far_HW - near_HW)[mixed_HW] > EDGE * depth_HW[mixed_HW]
    mixture = near_HW[mixed_HW] + weight_HW[mixed_HW] * (far_HW - near_HW)[mixed_HW]
    factor_HW[mixed_HW] = mixture / depth_HW[mixed_HW]
    return factor_HW


def _correlated(shape: tuple[int, ...], pixels: float, rng: np.random.Generator) -> np.ndarray:
    # Standard normal numbers, alike within a patch: blurring makes them smaller, which is undone.
    white_HW = rng.standard_normal(shape)
    if pixels == 0:
        return white_HW
    from scipy import ndimage

    kernel = ndimage.gaussian_filter1d(_impulse(pixels), pixels, mode="constant")
    # Wrapped around, so that the corners have neighbours as many as the middle.
    return ndimage.gaussian_filter(white_HW, pixels, mode="wrap") / float(np.square(kernel).sum())


def _impulse(pixels: float) -> np.ndarray:
    impulse = np.zeros(2 * int(np.ceil(5 * pixels)) + 1)
    impulse[len(impulse) // 2] = 1
    return impulse
