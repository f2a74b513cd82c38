"""Which surface points the light reaches: one ray from the light to each point that something may stand before.

Shape letters: M surface points, F those that face the light, D those in doubt, R further rays.
"""

from __future__ import annotations

import mujoco
import numpy as np

from spear_lightning.geometry.cameras import PixelIntrinsics
from spear_lightning.worlds.tabletop.coverage import CoverageGrid
from spear_lightning.worlds.tabletop.ray_camera import Part, RayCaster

SELF_HIT = 1e-6
"""A ray that ends within this share of its length before the surface has met the surface itself."""

LIGHT_GRID = CoverageGrid(PixelIntrinsics(120.0, 120.0, 80.0, 80.0, 160, 160))
"""What the light sees as it looks straight down; a cell is about a centimetre wide on the table."""

_DOWNWARD = np.array([1.0, -1.0, -1.0])
"""Signs that turn the axes of the world into those of an OpenCV camera that looks straight down."""


class Shadows:
    """The shadows that a point light throws. All geoms are taken to be convex, as MuJoCo's primitives are.

    Args:
        caster: Casts the rays.
        light_position_m: (3,) in the world frame.
    """

    def __init__(self, caster: RayCaster, light_position_m: np.ndarray) -> None:
        self._caster = caster
        self._light_3 = light_position_m
        self._downward_31 = _DOWNWARD[:, None]

    def cells(self, point_3N: np.ndarray) -> np.ndarray:
        """Return the cell of `LIGHT_GRID` in which the light sees each point of the world: int64 (N,)."""
        return LIGHT_GRID.cells((point_3N - self._light_3[:, None]) * self._downward_31)

    def shaded_cells(self, centre_K3: np.ndarray, radius_K: np.ndarray) -> np.ndarray:
        """Return in which cells the shadow of a sphere may fall: bool, indexed by what `cells` returns."""
        return LIGHT_GRID.covered((centre_K3 - self._light_3) * _DOWNWARD, radius_K)

    def rays(self, point_3N: np.ndarray) -> np.ndarray:
        """Return the vectors (N, 3) from the light to points of the world."""
        return np.ascontiguousarray((point_3N - self._light_3[:, None]).T)

    def lit(
        self,
        data: mujoco.MjData,
        point_3F: np.ndarray,
        geom_F: np.ndarray,
        parts: tuple[Part, ...],
        shaded_cells: np.ndarray | None,
        more_rays_R3: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return whether the light reaches points of surfaces that face it, and the ends of some more rays.

        Args:
            data: The state.
            point_3F: The points, world frame.
            geom_F: The geom that each lies on.
            parts: What throws shadows.
            shaded_cells: Where the shadows of what moves may fall; None: nowhere.
            more_rays_R3: Vectors from the light to further points, of which each is in doubt.

        Returns:
            bool (F,) and bool (R,).
        """
        doubtful_F = self._behind_static(data, point_3F, geom_F)
        if shaded_cells is not None:
            doubtful_F |= shaded_cells.take(self.cells(point_3F))
        doubtful = np.flatnonzero(doubtful_F)
        rays = np.concatenate([self.rays(point_3F.take(doubtful, 1)), more_rays_R3])
        hits = self._caster.cast(data, self._light_3, rays, parts, normals=False)
        # Rays run from the light to the surface: at length 1 they arrive.
        arrived = (hits.geom_N < 0) | (hits.distance_N >= 1 - SELF_HIT)
        lit_F = np.ones(len(geom_F), bool)
        lit_F[doubtful] = arrived[: len(doubtful)]
        return lit_F, arrived[len(doubtful) :]

    def _behind_static(self, data: mujoco.MjData, point_3F: np.ndarray, geom_F: np.ndarray) -> np.ndarray:
        # Whether a static geom may lie between the light and each point: the box around both meets the geom's box.
        # What faces the light is never in the shadow of its own geom, which is convex.
        light_31 = self._light_3[:, None]
        low_3F, high_3F = np.minimum(point_3F, light_31), np.maximum(point_3F, light_31)
        behind_F = np.zeros(len(geom_F), bool)
        for geom, low_3, high_3 in zip(self._caster.static_geoms, *self._caster.static_boxes(data), strict=True):
            meets_F = geom_F != geom
            for axis in range(3):
                meets_F &= (low_3F[axis] <= high_3[axis]) & (high_3F[axis] >= low_3[axis])
            behind_F |= meets_F
        return behind_F
