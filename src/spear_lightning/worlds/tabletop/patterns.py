"""Procedural patterns: how much of a material's second colour a surface point shows.

Each takes points in the geom's own frame, in cells (the pattern's scale is 1), and gives weights in [0, 1]. They are
solid textures: they need no unwrapping, and a pattern goes through an object like grain through wood.

Shape letters: M points.
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


def pattern_weights(pattern_M: np.ndarray, cells_M3: np.ndarray) -> np.ndarray:
    """Return the weight of the second colour.

    Args:
        pattern_M: Values of `Pattern`.
        cells_M3: float32 points in the geom's frame divided by the pattern's scale.

    Returns:
        float32 (M,) in [0, 1].
    """
    weights_M = np.zeros(len(cells_M3), np.float32)
    for pattern, function in _FUNCTIONS.items():
        chosen = np.flatnonzero(pattern_M == pattern)
        if len(chosen):
            weights_M[chosen] = function(cells_M3[chosen])
    return weights_M


def _checker(cells_M3: np.ndarray) -> np.ndarray:
    return (np.floor(cells_M3).astype(np.int32).sum(1) & 1).astype(np.float32)


def _stripes(cells_M3: np.ndarray) -> np.ndarray:
    # Soft edges: a plain threshold flickers when stripes are about a pixel wide.
    wave_M = np.sin(np.float32(np.pi) * cells_M3[:, 0])
    return np.clip(np.float32(0.5) + np.float32(2) * wave_M, 0, 1)


def _wood(cells_M3: np.ndarray) -> np.ndarray:
    # Planks of four cells along y; in each, grain that runs along x: noise, stretched twenty times.
    plank_M = np.floor(cells_M3[:, 1] * np.float32(0.25))
    grain_M3 = cells_M3 * np.array([0.05, 1, 1], np.float32)
    grain_M3[:, 2] += plank_M * np.float32(7.3)
    tone_M = _hash(plank_M.astype(np.int32), np.int32(3), np.int32(5))
    return np.float32(0.7) * _value_noise(grain_M3) + np.float32(0.3) * tone_M


def _speckle(cells_M3: np.ndarray) -> np.ndarray:
    cell_M3 = np.floor(cells_M3).astype(np.int32)
    return (_hash(*cell_M3.T) < SPECKLE_SHARE).astype(np.float32)


def _clouds(cells_M3: np.ndarray) -> np.ndarray:
    return _value_noise(cells_M3)


def _value_noise(points_M3: np.ndarray) -> np.ndarray:
    # Random values at whole coordinates, blended smoothly in between.
    cell_M3 = np.floor(points_M3)
    t_M3 = points_M3 - cell_M3
    t_M3 = t_M3 * t_M3 * (np.float32(3) - np.float32(2) * t_M3)
    x, y, z = cell_M3.astype(np.int32).T
    tx, ty, tz = t_M3.T
    planes = []
    for dz in (0, 1):
        rows = []
        for dy in (0, 1):
            left, right = _hash(x, y + dy, z + dz), _hash(x + 1, y + dy, z + dz)
            rows.append(left + tx * (right - left))
        planes.append(rows[0] + ty * (rows[1] - rows[0]))
    return planes[0] + tz * (planes[1] - planes[0])


def _hash(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    # A pseudo-random number in [0, 1) for whole coordinates; integers wrap around on purpose.
    mixed = x.astype(np.uint32) * np.uint32(73856093)
    mixed = mixed ^ (y.astype(np.uint32) * np.uint32(19349663)) ^ (z.astype(np.uint32) * np.uint32(83492791))
    mixed = (mixed ^ (mixed >> np.uint32(15))) * np.uint32(0x2C1B3C6D)
    mixed = (mixed ^ (mixed >> np.uint32(12))) * np.uint32(0x297A2D39)
    return (mixed >> np.uint32(16)).astype(np.float32) * np.float32(1 / 65536)


_FUNCTIONS = {
    Pattern.CHECKER: _checker,
    Pattern.STRIPES: _stripes,
    Pattern.WOOD: _wood,
    Pattern.SPECKLE: _speckle,
    Pattern.CLOUDS: _clouds,
}
