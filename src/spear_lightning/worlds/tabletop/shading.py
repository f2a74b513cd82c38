"""How surfaces look: materials, one point light, an ambient light, a sky.

Colours are given as they appear on a screen, in [0, 1]. Light adds up in linear units, for which a screen's curve is
taken to be the square: linear = colour ** 2.

Shape letters: G geoms of the model, M surface points, N rays.
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
        geom_M: int32 geom ids.
        point_M3: float64, world frame, metres.
        normal_M3: float32 outward unit normals, world frame.
        to_eye_M3: float32 vectors of any length towards the camera, world frame.
    """

    geom_M: np.ndarray
    point_M3: np.ndarray
    normal_M3: np.ndarray
    to_eye_M3: np.ndarray

    @classmethod
    def joined(cls, parts: Sequence[Surfaces]) -> Surfaces:
        """Return the surface points of several cameras, one after the other."""
        return cls(
            *(
                np.concatenate([getattr(part, name) for part in parts])
                for name in ("geom_M", "point_M3", "normal_M3", "to_eye_M3")
            )
        )


@dataclass(frozen=True)
class Shaded:
    """Light that surfaces send to the camera, linear.

    Attributes:
        ambient_M3: float32, what is left in the shadow.
        direct_M3: float32, what the point light adds; zero on surfaces that face away from it.
        facing_M: bool, whether the surface faces the point light.
    """

    ambient_M3: np.ndarray
    direct_M3: np.ndarray
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
        self._light_rgb = np.asarray(look.light_rgb, np.float32)
        self._ambient_rgb = np.asarray(look.ambient_rgb, np.float32)
        self._horizon_rgb, self._zenith_rgb = linear(look.horizon_rgb), linear(look.zenith_rgb)
        self._base_G3 = linear(look.base_rgb)
        self._contrast_G3 = linear(look.second_rgb) - self._base_G3
        self._pattern_G = np.asarray(look.pattern, np.int8)
        self._frequency_G1 = (1 / np.asarray(look.pattern_scale_m, np.float32))[:, None]
        self._offset_G3 = np.asarray(look.pattern_offset, np.float32)
        self._specular_G1 = np.asarray(look.specular, np.float32)[:, None]

    def shade(self, data: mujoco.MjData, surfaces: Surfaces) -> Shaded:
        """Shade surface points as if nothing were in the light's way.

        Args:
            data: The state, for the frames of the geoms.
            surfaces: What is seen.

        Returns:
            The light they send to the camera.
        """
        albedo_M3 = self._albedo(data, surfaces)
        normal_M3 = surfaces.normal_M3
        to_light_M3 = _unit((self.light_position_m - surfaces.point_M3).astype(np.float32))
        half_M3 = _unit(to_light_M3 + _unit(surfaces.to_eye_M3))
        facing_M1 = np.maximum(_dot(normal_M3, to_light_M3), 0)[:, None]
        shine_M1 = np.maximum(_dot(normal_M3, half_M3), 0)[:, None]
        for _ in range(SHINE_SQUARINGS):
            shine_M1 *= shine_M1
        shine_M1 *= self._specular_G1[surfaces.geom_M] * np.sign(facing_M1)
        direct_M3 = albedo_M3 * facing_M1
        direct_M3 += shine_M1
        direct_M3 *= self._light_rgb
        from_above_M1 = np.float32(1 - SKY_LIGHT / 2) + np.float32(SKY_LIGHT / 2) * normal_M3[:, 2:]
        albedo_M3 *= from_above_M1
        albedo_M3 *= self._ambient_rgb
        return Shaded(ambient_M3=albedo_M3, direct_M3=direct_M3, facing_M=facing_M1[:, 0] > 0)

    def sky(self, direction_N3: np.ndarray) -> np.ndarray:
        """Return the background's linear colour (N, 3) along directions of any length in the world frame."""
        up_N1 = np.clip(_unit(direction_N3.astype(np.float32))[:, 2:], 0, 1)
        return self._horizon_rgb + up_N1 * (self._zenith_rgb - self._horizon_rgb)

    def _albedo(self, data: mujoco.MjData, surfaces: Surfaces) -> np.ndarray:
        geom_M = surfaces.geom_M
        albedo_M3 = self._base_G3[geom_M]
        pattern_M = self._pattern_G[geom_M]
        patterned = np.flatnonzero(pattern_M)
        if len(patterned):
            geom_P = geom_M[patterned]
            relative_P3 = (surfaces.point_M3[patterned] - data.geom_xpos[geom_P]).astype(np.float32)
            frame_P33 = data.geom_xmat.astype(np.float32).reshape(-1, 3, 3)[geom_P]
            local_P3 = np.einsum("pij,pi->pj", frame_P33, relative_P3)
            cells_P3 = local_P3 * self._frequency_G1[geom_P] + self._offset_G3[geom_P]
            weight_P = pattern_weights(pattern_M[patterned], cells_P3)
            albedo_M3[patterned] += weight_P[:, None] * self._contrast_G3[geom_P]
        return albedo_M3


def linear(rgb: np.ndarray) -> np.ndarray:
    """Return colours in [0, 1] as on a screen in linear units: float32."""
    return np.square(np.asarray(rgb, np.float32))


def encode(linear_N3: np.ndarray) -> np.ndarray:
    """Return linear colours as uint8 pixels of a screen; what is brighter than white becomes white."""
    clipped_N3 = np.minimum(linear_N3, np.float32(1))
    np.sqrt(clipped_N3, out=clipped_N3)
    clipped_N3 *= np.float32(255)
    clipped_N3 += np.float32(0.5)
    return clipped_N3.astype(np.uint8)


class SensorNoise:
    """Adds independent, nearly Gaussian noise to every value of a picture.

    One random byte per value picks from the 256 quantiles of a rounded normal distribution: twenty times as fast
    as drawing normal numbers.

    Args:
        sigma: Standard deviation, of 255 levels; 0 adds nothing.
    """

    def __init__(self, sigma: float) -> None:
        # The normal quantile function, found by counting: sorted draws of a fixed stream would not be symmetric.
        grid = np.linspace(-4, 4, 8001)
        cumulative = np.cumsum(np.exp(-0.5 * grid**2))
        quantiles = np.interp((np.arange(256) + 0.5) / 256, cumulative / cumulative[-1], grid)
        quantiles /= quantiles.std()
        self._levels = np.rint(sigma * quantiles).astype(np.int16)
        self._silent = sigma == 0

    def add(self, image_HW3: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return a uint8 picture with noise; the values stay in [0, 255]."""
        if self._silent:
            return image_HW3
        noise = self._levels[np.frombuffer(rng.bytes(image_HW3.size), np.uint8)].reshape(image_HW3.shape)
        noise += image_HW3
        return np.clip(noise, 0, 255, out=noise).astype(np.uint8)


def _dot(a_M3: np.ndarray, b_M3: np.ndarray) -> np.ndarray:
    return np.einsum("mi,mi->m", a_M3, b_M3)


def _unit(vector_M3: np.ndarray) -> np.ndarray:
    return vector_M3 / np.sqrt(_dot(vector_M3, vector_M3))[:, None]
