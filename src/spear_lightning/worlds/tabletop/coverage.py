"""Where spheres may be seen from a point: a coarse picture, never too small, at a few microseconds a sphere.

Shape letters: K spheres, N points.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from spear_lightning.geometry.cameras import PixelIntrinsics

MARGIN = 1.001
"""Spheres grow by this factor: rounding shall not make them too small."""


@dataclass(frozen=True)
class CoverageGrid:
    """A pinhole camera whose pixels say whether a sphere may be seen in them.

    What lies outside the picture is counted to its border, and what lies beside or behind the camera has a cell of
    its own, so that every direction has a cell.

    Attributes:
        intrinsics: Of the camera; the frame is OpenCV's.
    """

    intrinsics: PixelIntrinsics

    @property
    def behind(self) -> int:
        """The cell of everything that is not before the camera."""
        return self.intrinsics.width * self.intrinsics.height

    def covered(self, centre_K3: np.ndarray, radius_K: np.ndarray) -> np.ndarray:
        """Return in which cells spheres may be seen.

        Args:
            centre_K3: Centres in the camera frame.
            radius_K: Radii.

        Returns:
            bool (height * width + 1,): the pixels row by row, and the cell `behind`.
        """
        camera, z_K, radius_K = self.intrinsics, centre_K3[:, 2], MARGIN * radius_K
        if (z_K <= radius_K).any():
            return np.ones(self.behind + 1, bool)
        left_K, right_K = _bounds(centre_K3[:, 0], z_K, radius_K, camera.fx, camera.cx, camera.width)
        top_K, bottom_K = _bounds(centre_K3[:, 1], z_K, radius_K, camera.fy, camera.cy, camera.height)
        cells = np.zeros(self.behind + 1, bool)
        cells_HW = cells[:-1].reshape(camera.height, camera.width)
        for left, right, top, bottom in zip(left_K, right_K, top_K, bottom_K, strict=True):
            cells_HW[top:bottom, left:right] = True
        return cells

    def cells(self, point_3N: np.ndarray) -> np.ndarray:
        """Return the cell in which each point of the camera frame is seen: int64 (N,)."""
        camera, (x_N, y_N, z_N) = self.intrinsics, point_3N
        before_N = z_N > 0
        inverse_N = 1 / np.where(before_N, z_N, 1)
        # Far outside, the product may be too large for an integer: it is cut before it becomes one.
        column_N = np.clip(camera.fx * x_N * inverse_N + camera.cx, 0, camera.width - 1)
        row_N = np.clip(camera.fy * y_N * inverse_N + camera.cy, 0, camera.height - 1)
        cell_N = row_N.astype(np.int64) * camera.width + column_N.astype(np.int64)
        return np.where(before_N, cell_N, self.behind)


def _bounds(
    across_K: np.ndarray, z_K: np.ndarray, radius_K: np.ndarray, focal: float, middle: float, count: int
) -> tuple[list[int], list[int]]:
    # The two tangents from the camera to each sphere, in the plane of one image axis and the optical axis.
    angle_K = np.arctan2(across_K, z_K)
    spread_K = np.arcsin(radius_K / np.hypot(across_K, z_K))
    first_K = np.floor(focal * np.tan(angle_K - spread_K) + middle).clip(0, count - 1)
    last_K = np.ceil(focal * np.tan(angle_K + spread_K) + middle).clip(1, count)
    return first_K.astype(np.int64).tolist(), last_K.astype(np.int64).tolist()
