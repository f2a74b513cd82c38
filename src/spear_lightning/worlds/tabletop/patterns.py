"""Procedural patterns: how much of a material's second colour a surface point shows.

Each takes points in the geom's own frame, in cells (the pattern's scale is 1), and gives weights in [0, 1]. They
are solid textures: they need no unwrapping, and a pattern goes through an object like grain through wood.

Shape letters: M points; coordinates come first, as in `shading`.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class Pattern(IntEnum):
    """The patterns a material can have."""

    PLAIN = 0
    CHECKER = 1
    STRIPES = 2
    WOOD = 3
    SPECKLE = 4
    CLOUDS = 5


SPECKLE_SHARE = 0.3
"""The share of cells in which a speckle lies."""


def pattern_weights(pattern_M: np.ndarray, cells_3M: np.ndarray) -> np.ndarray:
    """Return the weight of the second colour.

    Args:
        pattern_M: Values of `Pattern`.
        cells_3M: float32 points in the geom's frame divided by the pattern's scale.

    Returns:
        float32 (M,) in [0, 1].
    """
    weights_M = np.zeros(len(pattern_M), np.float32)
    for pattern, function in _FUNCTIONS.items():
        chosen = np.flatnonzero(pattern_M == pattern)
        if len(chosen):
            weights_M[chosen] = function(cells_3M.take(chosen, 1))
    return weights_M


def _checker(cells_3M: np.ndarray) -> np.ndarray:
    x, y, z = _whole(cells_3M)
    return ((x + y + z) & 1).astype(np.float32)


def _stripes(cells_3M: np.ndarray) -> np.ndarray:
    # Soft edges: a plain threshold flickers when stripes are about a pixel wide.
    wave_M = np.sin(np.float32(np.pi) * cells_3M[0])
    return np.clip(np.float32(0.5) + np.float32(2) * wave_M, 0, 1)


def _wood(cells_3M: np.ndarray) -> np.ndarray:
    # Planks of four cells along y; in each, grain that runs along x: noise, stretched twenty times.
    x, y, z = cells_3M
    plank_M = np.floor(np.float32(0.25) * y)
    grain_3M = np.stack([np.float32(0.05) * x, y, z + np.float32(7.3) * plank_M])
    tone_M = _hash(plank_M.astype(np.int32), 3, 5)
    return np.float32(0.7) * _value_noise(grain_3M) + np.float32(0.3) * tone_M


def _speckle(cells_3M: np.ndarray) -> np.ndarray:
    return (_hash(*_whole(cells_3M)) < SPECKLE_SHARE).astype(np.float32)


def _value_noise(points_3M: np.ndarray) -> np.ndarray:
    # Random values at whole coordinates, blended smoothly in between.
    t_3M = points_3M - np.floor(points_3M)
    tx, ty, tz = t_3M * t_3M * (np.float32(3) - np.float32(2) * t_3M)
    x, y, z = _whole(points_3M)
    planes = []
    for dz in (0, 1):
        rows = []
        for dy in (0, 1):
            left, right = _hash(x, y + dy, z + dz), _hash(x + 1, y + dy, z + dz)
            rows.append(left + tx * (right - left))
        planes.append(rows[0] + ty * (rows[1] - rows[0]))
    return planes[0] + tz * (planes[1] - planes[0])


def _whole(points_3M: np.ndarray) -> np.ndarray:
    return np.floor(points_3M).astype(np.int32)


def _hash(x: np.ndarray, y: np.ndarray | int, z: np.ndarray | int) -> np.ndarray:
    # A pseudo-random number in [0, 1) for whole coordinates; 32-bit integers wrap around on purpose.
    mixed = x * np.int32(73856093) ^ y * np.int32(19349663) ^ z * np.int32(83492791)
    mixed = mixed.view(np.uint32)
    mixed = (mixed ^ (mixed >> np.uint32(15))) * np.uint32(0x2C1B3C6D)
    mixed = (mixed ^ (mixed >> np.uint32(12))) * np.uint32(0x297A2D39)
    return (mixed >> np.uint32(16)).astype(np.float32) * np.float32(1 / 65536)


_FUNCTIONS = {
    Pattern.CHECKER: _checker,
    Pattern.STRIPES: _stripes,
    Pattern.WOOD: _wood,
    Pattern.SPECKLE: _speckle,
    Pattern.CLOUDS: _value_noise,
}
