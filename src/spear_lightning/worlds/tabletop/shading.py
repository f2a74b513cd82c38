"""How surfaces look: materials, one point light, an ambient light, a sky.

Colours are given as they appear on a screen, in [0, 1]. Light adds up in linear units, for which a screen's curve
is taken to be the square: linear = colour ** 2.

Shape letters: G geoms of the model, M surface points, N rays. Coordinates and colours come first: NumPy is several
times as fast on three long rows as on many rows of three.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mujoco
import numpy as np

from spear_lightning.errors import ShapeError
from spear_lightning.worlds.tabletop.patterns import Pattern, pattern_weights

SHINE_SQUARINGS = 5
"""The highlight is cos ** (2 ** this) of the angle between the normal and the half vector (Blinn's model)."""

SKY_LIGHT = 0.35
"""Share of the ambient light that comes from above alone: it tells the faces of an object in shadow apart."""


@dataclass(frozen=True)
class Look:
    """What the geoms of a scene are made of, and its light.

    Attributes:
        base_rgb: (G, 3) colours in [0, 1] as on a screen.
        second_rgb: (G, 3) the other colour of the pattern.
        pattern: (G,) values of `Pattern`.
        pattern_scale_m: (G,) size of a pattern's cell, metres.
        pattern_offset: (G, 3) shift of the pattern, cells. A cell's border on a face of a box flickers: shift it.
        specular: (G,) strength of the highlight, 0 dull to 1 polished.
        light_position_m: (3,) the point light, world frame.
        light_rgb: (3,) its colour times intensity, linear; 1 shows a white surface that faces it as white.
        ambient_rgb: (3,) the light from all sides, linear.
        horizon_rgb: (3,) colour of the background at eye level and below.
        zenith_rgb: (3,) colour of the background straight above.
    """

    base_rgb: np.ndarray
    second_rgb: np.ndarray
    pattern: np.ndarray
    pattern_scale_m: np.ndarray
    pattern_offset: np.ndarray
    specular: np.ndarray
    light_position_m: np.ndarray
    light_rgb: np.ndarray
    ambient_rgb: np.ndarray
    horizon_rgb: np.ndarray
    zenith_rgb: np.ndarray

    @classmethod
    def plain(cls, model: mujoco.MjModel) -> Look:
        """Return a look with the model's own geom colours, no patterns, and a white light above the table."""
        rgb = model.geom_rgba[:, :3].astype(np.float32)
        count = len(rgb)
        return cls(
            base_rgb=rgb,
            second_rgb=rgb,
            pattern=np.full(count, Pattern.PLAIN),
            pattern_scale_m=np.full(count, 0.02),
            pattern_offset=np.full((count, 3), 0.37),
            specular=np.full(count, 0.2),
            light_position_m=np.array([0.1, 0.8, 1.6]),
            light_rgb=np.full(3, 0.75),
            ambient_rgb=np.full(3, 0.3),
            horizon_rgb=np.array([0.75, 0.78, 0.82]),
            zenith_rgb=np.array([0.45, 0.6, 0.8]),
        )


@dataclass(frozen=True)
class Surfaces:
    """Surface points seen by cameras.

    Attributes:
        geom_M: int geom ids.
        point_3M: float64, world frame, metres.
        normal_3M: float32 outward unit normals, world frame.
        to_eye_3M: float32 vectors of any length towards the camera, world frame.
    """

    geom_M: np.ndarray
    point_3M: np.ndarray
    normal_3M: np.ndarray
    to_eye_3M: np.ndarray

    @classmethod
    def joined(cls, parts: Sequence[Surfaces]) -> Surfaces:
        """Return the surface points of several cameras, one after the other."""
        return cls(
            *(
                np.concatenate([getattr(part, name) for part in parts], axis=-1)
                for name in ("geom_M", "point_3M", "normal_3M", "to_eye_3M")
            )
        )


@dataclass(frozen=True)
class Shaded:
    """Light that surfaces send to the camera, linear.

    Attributes:
        ambient_3M: float32, what is left in the shadow.
        direct_3M: float32, what the point light adds; zero on surfaces that face away from it.
        facing_M: bool, whether the surface faces the point light.
    """

    ambient_3M: np.ndarray
    direct_3M: np.ndarray
    facing_M: np.ndarray


class Shader:
    """Computes the light that surfaces send to the camera.

    Args:
        look: Materials and lights.
        geoms: Number of geoms of the model.

    Raises:
        ShapeError: If the look is not one for so many geoms.
    """

    def __init__(self, look: Look, geoms: int) -> None:
        for name in ("base_rgb", "second_rgb", "pattern", "pattern_scale_m", "pattern_offset", "specular"):
            if len(getattr(look, name)) != geoms:
                raise ShapeError(
                    "A look has one entry for each geom of the model",
                    where=f"Look.{name}",
                    found=len(getattr(look, name)),
                    expected=geoms,
                )
        self.light_position_m = np.asarray(look.light_position_m, np.float64)
        self._light_31 = np.array(look.light_rgb, np.float32)[:, None]
        self._ambient_31 = np.array(look.ambient_rgb, np.float32)[:, None]
        self._horizon_31, self._zenith_31 = linear(look.horizon_rgb)[:, None], linear(look.zenith_rgb)[:, None]
        self._base_3G = linear(look.base_rgb).T.copy()
        self._contrast_3G = linear(look.second_rgb).T - self._base_3G
        self._pattern_G = np.asarray(look.pattern, np.int8)
        self._frequency_G = 1 / np.asarray(look.pattern_scale_m, np.float32)
        self._offset_3G = np.asarray(look.pattern_offset, np.float32).T.copy()
        self._specular_G = np.asarray(look.specular, np.float32)

    def shade(self, data: mujoco.MjData, surfaces: Surfaces) -> Shaded:
        """Shade surface points as if nothing were in the light's way.

        Args:
            data: The state, for the frames of the geoms.
            surfaces: What is seen.

        Returns:
            The light they send to the camera.
        """
        albedo_3M = self._albedo(data, surfaces)
        normal_3M = surfaces.normal_3M
        to_light_3M = _unit((self.light_position_m[:, None] - surfaces.point_3M).astype(np.float32))
        half_3M = _unit(to_light_3M + _unit(surfaces.to_eye_3M))
        facing_M = np.maximum(_dot(normal_3M, to_light_3M), 0)
        shine_M = np.maximum(_dot(normal_3M, half_3M), 0)
        for _ in range(SHINE_SQUARINGS):
            shine_M *= shine_M
        shine_M *= self._specular_G.take(surfaces.geom_M)
        shine_M *= facing_M > 0
        direct_3M = albedo_3M * facing_M
        direct_3M += shine_M
        direct_3M *= self._light_31
        albedo_3M *= np.float32(1 - SKY_LIGHT / 2) + np.float32(SKY_LIGHT / 2) * normal_3M[2]
        albedo_3M *= self._ambient_31
        return Shaded(ambient_3M=albedo_3M, direct_3M=direct_3M, facing_M=facing_M > 0)

    def sky(self, direction_3N: np.ndarray) -> np.ndarray:
        """Return the background's linear colour (3, N) along directions of any length in the world frame."""
        up_N = np.maximum(_unit(direction_3N.astype(np.float32))[2], 0)
        return self._horizon_31 + up_N * (self._zenith_31 - self._horizon_31)

    def _albedo(self, data: mujoco.MjData, surfaces: Surfaces) -> np.ndarray:
        geom_M = surfaces.geom_M
        albedo_3M = self._base_3G.take(geom_M, 1)
        pattern_M = self._pattern_G.take(geom_M)
        if pattern_M.any():
            cells_3M = _in_geom_frame(data, geom_M, surfaces.point_3M)
            cells_3M *= self._frequency_G.take(geom_M)
            cells_3M += self._offset_3G.take(geom_M, 1)
            albedo_3M += pattern_weights(pattern_M, cells_3M) * self._contrast_3G.take(geom_M, 1)
        return albedo_3M


def _in_geom_frame(data: mujoco.MjData, geom_M: np.ndarray, point_3M: np.ndarray) -> np.ndarray:
    # Points of the world in the frames of their geoms, float32: the transposed rotations, column by column.
    x, y, z = (point_3M - data.geom_xpos.T.take(geom_M, 1)).astype(np.float32)
    m = data.geom_xmat.T.astype(np.float32).take(geom_M, 1)
    return np.stack([m[axis] * x + m[3 + axis] * y + m[6 + axis] * z for axis in range(3)])


def linear(rgb: np.ndarray) -> np.ndarray:
    """Return colours in [0, 1] as on a screen in linear units: float32."""
    return np.square(np.asarray(rgb, np.float32))


def encode(linear_3N: np.ndarray) -> np.ndarray:
    """Return linear colours as pixels of a screen; what is brighter than white becomes white.

    Args:
        linear_3N: float32 linear colours, at least 0.

    Returns:
        uint32 (N,): the four bytes red, green, blue and nothing as one number, which moves as one.
    """
    screen_3N = np.sqrt(np.minimum(linear_3N, np.float32(1)))
    screen_3N *= np.float32(255)
    screen_3N += np.float32(0.5)
    pixel_N4 = np.zeros((screen_3N.shape[1], 4), np.uint8)
    for channel in range(3):
        pixel_N4[:, channel] = screen_3N[channel]
    return pixel_N4.view(np.uint32)[:, 0]


def decode(pixel_N: np.ndarray) -> np.ndarray:
    """Return the pixels of `encode` as a view of uint8 RGB (N, 3)."""
    return pixel_N.view(np.uint8).reshape(-1, 4)[:, :3]


class SensorNoise:
    """Adds independent, nearly Gaussian noise to every value of a picture.

    One random byte per value picks from the 256 quantiles of a rounded normal distribution: several times as fast
    as drawing normal numbers.

    Args:
        sigma: Standard deviation, of 255 levels; 0 adds nothing.
    """

    def __init__(self, sigma: float) -> None:
        grid = np.linspace(-4, 4, 8001)
        cumulative = np.cumsum(np.exp(-0.5 * grid**2))
        quantiles = np.interp((np.arange(256) + 0.5) / 256, cumulative / cumulative[-1], grid)
        self._levels = np.rint(sigma * quantiles / quantiles.std()).astype(np.int16)
        self._silent = sigma == 0

    def add(self, image_HW3: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return a uint8 picture with noise; the values stay in [0, 255]."""
        if self._silent:
            return image_HW3
        chosen = np.frombuffer(rng.bytes(image_HW3.size), np.uint8)
        values = self._levels.take(chosen).reshape(image_HW3.shape)
        values += image_HW3
        return np.clip(values, 0, 255, out=values).astype(np.uint8)


def _dot(a_3M: np.ndarray, b_3M: np.ndarray) -> np.ndarray:
    return a_3M[0] * b_3M[0] + a_3M[1] * b_3M[1] + a_3M[2] * b_3M[2]


def _unit(vector_3M: np.ndarray) -> np.ndarray:
    return vector_3M / np.sqrt(_dot(vector_3M, vector_3M))
