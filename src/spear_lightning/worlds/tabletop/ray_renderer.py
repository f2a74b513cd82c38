"""Pictures of all cameras of a moment, by ray casting: colour, texture, shadow; no display, no OpenGL.

Most of a picture from a fixed camera never changes: the table, the floor, their shadows. From the second picture
on that a camera takes from one place, this background is kept, and rays are cast only where something that moves
may be seen, or may throw its shadow: inside the cones that spheres around the moving geoms fill as seen from the
camera and from the light.

Shape letters: N pixels of a camera, M surface points, R background pixels that may lie in a shadow, K spheres.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import mujoco
import numpy as np

from spear_lightning.geometry.cameras import PixelIntrinsics
from spear_lightning.worlds.tabletop.ray_camera import (
    ALL,
    MOVING,
    STATIC,
    CameraPose,
    Hits,
    Part,
    RayCaster,
    pixel_rays,
)
from spear_lightning.worlds.tabletop.shading import Look, SensorNoise, Shaded, Shader, Surfaces, decode, encode

SELF_HIT = 1e-6
"""A shadow ray that ends within this share of its length before the surface has met the surface itself."""

SPHERE_MARGIN = 1.02
"""Bounding spheres grow by this factor: directions are compared in single precision."""


@dataclass(frozen=True)
class _Background:
    """A fixed camera's picture of everything that cannot move."""

    direction_N3: np.ndarray  # float64, world frame, one unit of depth long
    unit_3N: np.ndarray  # float32, the same as unit vectors
    depth_N: np.ndarray  # float64, inf where nothing is
    image_N: np.ndarray  # pixels (see `shading.encode`), with the shadows of what cannot move
    shady_N: np.ndarray  # pixels, all in the shadow
    lit_N: np.ndarray  # bool, whether the light reaches it
    light_ray_N3: np.ndarray  # float64, from the light to the surface
    light_unit_3N: np.ndarray  # float32, the same as unit vectors


@dataclass
class _View:
    """A camera: its rays, where it was last, and what it has seen there of the background."""

    intrinsics: PixelIntrinsics
    ray_N3: np.ndarray
    pose: CameraPose | None = None
    background: _Background | None = None


@dataclass(frozen=True)
class _Frame:
    """A picture in the making: some pixels still need their surface's colour, some may lie in a shadow."""

    image_N: np.ndarray
    pixel_M: np.ndarray
    surfaces: Surfaces
    receiver_R: np.ndarray
    receiver_ray_R3: np.ndarray
    receiver_shady_R: np.ndarray


class RayRenderer:
    """Renders the cameras of a scene.

    Args:
        model: The scene; sizes, groups and static geoms must not change afterwards.
        look: Materials and lights.
        cameras: Intrinsics of each camera.
        hidden_groups: Geom groups that cameras do not see.
        supersampling: Rays along each side of a pixel; 2 smooths edges at up to four times the cost.
        noise: Standard deviation of the sensor noise, of 255 levels.
    """

    def __init__(
        self,
        model: mujoco.MjModel,
        look: Look,
        cameras: Mapping[str, PixelIntrinsics],
        hidden_groups: Collection[int] = (),
        supersampling: int = 1,
        noise: float = 2.0,
    ) -> None:
        self._caster = RayCaster(model, hidden_groups)
        self._shader = Shader(look, model.ngeom)
        self._noise = SensorNoise(noise)
        self._samples = supersampling
        self._views = {
            name: _View(camera, pixel_rays(_finer(camera, supersampling))) for name, camera in cameras.items()
        }

    def render(
        self, data: mujoco.MjData, poses: Mapping[str, CameraPose], rng: np.random.Generator | None = None
    ) -> dict[str, np.ndarray]:
        """Take a picture with each camera.

        Args:
            data: The state; its positions must have been computed.
            poses: Where each camera is; cameras without a pose take no picture.
            rng: Draws the sensor noise; None: no noise.

        Returns:
            uint8 RGB (H, W, 3) for each pose.
        """
        frames = [self._look(data, self._views[name], pose) for name, pose in poses.items()]
        self._colour(data, frames)
        return {
            name: self._develop(self._views[name], frame, rng) for name, frame in zip(poses, frames, strict=True)
        }

    def _look(self, data: mujoco.MjData, view: _View, pose: CameraPose) -> _Frame:
        if not pose.same_as(view.pose):
            view.pose, view.background = pose.copy(), None
            return self._look_everywhere(data, pose, view.ray_N3 @ pose.rotation.T, ALL)
        if view.background is None:
            view.background = self._paint_background(data, view, pose)
        return self._look_at_moving(data, pose, view.background)

    def _look_everywhere(
        self, data: mujoco.MjData, pose: CameraPose, direction_N3: np.ndarray, parts: tuple[Part, ...]
    ) -> _Frame:
        hits = self._caster.cast(data, pose.position_m, direction_N3, parts)
        seen_N = hits.geom_N >= 0
        pixel_M = np.flatnonzero(seen_N)
        image_N = np.zeros(len(direction_N3), np.uint32)
        if len(pixel_M) < len(image_N):
            image_N[~seen_N] = encode(self._shader.sky(direction_N3[~seen_N].T))
        surfaces = _surfaces(pose, direction_N3, hits, pixel_M)
        return _Frame(image_N, pixel_M, surfaces, pixel_M[:0], direction_N3[:0], image_N[:0])

    def _look_at_moving(self, data: mujoco.MjData, pose: CameraPose, background: _Background) -> _Frame:
        centre_K3, radius_K = self._caster.moving_spheres(data)
        candidate = np.flatnonzero(_in_cones(background.unit_3N, centre_K3 - pose.position_m, radius_K))
        direction_N3 = background.direction_N3.take(candidate, 0)
        hits = self._caster.cast(data, pose.position_m, direction_N3, MOVING)
        nearer = np.flatnonzero((hits.geom_N >= 0) & (hits.distance_N < background.depth_N.take(candidate)))
        pixel_M = candidate.take(nearer)
        from_light_K3 = centre_K3 - self._shader.light_position_m
        exposed_N = _in_cones(background.light_unit_3N, from_light_K3, radius_K)
        exposed_N &= background.lit_N
        exposed_N[pixel_M] = False
        receiver_R = np.flatnonzero(exposed_N)
        return _Frame(
            background.image_N.copy(),
            pixel_M,
            _surfaces(pose, direction_N3, hits, nearer),
            receiver_R,
            background.light_ray_N3.take(receiver_R, 0),
            background.shady_N.take(receiver_R),
        )

    def _colour(self, data: mujoco.MjData, frames: list[_Frame]) -> None:
        # All cameras together: the fixed costs of a few dozen array operations are paid once.
        surfaces = Surfaces.joined([frame.surfaces for frame in frames])
        shaded = self._shader.shade(data, surfaces)
        lit_M, shadowed = self._lit(data, surfaces, shaded, [frame.receiver_ray_R3 for frame in frames], ALL)
        colour_M = encode(shaded.ambient_3M + shaded.direct_3M * lit_M)
        surface, receiver = 0, 0
        for frame in frames:
            count, receivers = len(frame.pixel_M), len(frame.receiver_R)
            frame.image_N[frame.pixel_M] = colour_M[surface : surface + count]
            dark = np.flatnonzero(shadowed[receiver : receiver + receivers])
            frame.image_N[frame.receiver_R.take(dark)] = frame.receiver_shady_R.take(dark)
            surface, receiver = surface + count, receiver + receivers

    def _lit(
        self,
        data: mujoco.MjData,
        surfaces: Surfaces,
        shaded: Shaded,
        more_rays: list[np.ndarray],
        parts: tuple[Part, ...],
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return whether the light reaches each surface point, and whether each of some more rays is stopped."""
        light = self._shader.light_position_m
        facing = np.flatnonzero(shaded.facing_M)
        point_3F = surfaces.point_3M.take(facing, 1)
        doubtful_F = self._behind_static(data, point_3F, surfaces.geom_M.take(facing))
        if Part.MOVING in parts:
            centre_K3, radius_K = self._caster.moving_spheres(data)
            doubtful_F |= _in_cones(_units(point_3F - light[:, None]), centre_K3 - light, radius_K)
        doubtful = np.flatnonzero(doubtful_F)
        ray_D3 = point_3F.take(doubtful, 1).T - light
        # Rays run from the light to the surface: at length 1 they arrive.
        hits = self._caster.cast(data, light, np.concatenate([ray_D3, *more_rays]), parts, normals=False)
        shadowed = (hits.geom_N >= 0) & (hits.distance_N < 1 - SELF_HIT)
        lit_M = shaded.facing_M.copy()
        lit_M[facing.take(doubtful)] = ~shadowed[: len(doubtful)]
        return lit_M, shadowed[len(doubtful) :]

    def _behind_static(self, data: mujoco.MjData, point_3F: np.ndarray, geom_F: np.ndarray) -> np.ndarray:
        # Whether a static geom may lie between the light and each point: the box around both meets the geom's box.
        # What faces the light is never in the shadow of its own geom, all of which are convex.
        light_31 = self._shader.light_position_m[:, None]
        low_3F, high_3F = np.minimum(point_3F, light_31), np.maximum(point_3F, light_31)
        behind_F = np.zeros(len(geom_F), bool)
        for geom, low_3, high_3 in zip(self._caster.static_geoms, *self._caster.static_boxes(data), strict=True):
            meets_F = geom_F != geom
            for axis in range(3):
                meets_F &= (low_3F[axis] <= high_3[axis]) & (high_3F[axis] >= low_3[axis])
            behind_F |= meets_F
        return behind_F

    def _paint_background(self, data: mujoco.MjData, view: _View, pose: CameraPose) -> _Background:
        direction_N3 = view.ray_N3 @ pose.rotation.T
        hits = self._caster.cast(data, pose.position_m, direction_N3, STATIC)
        pixel_M = np.flatnonzero(hits.geom_N >= 0)
        surfaces = _surfaces(pose, direction_N3, hits, pixel_M)
        shaded = self._shader.shade(data, surfaces)
        lit_M, _ = self._lit(data, surfaces, shaded, [], STATIC)
        shady_N = encode(self._shader.sky(direction_N3.T))
        image_N = shady_N.copy()
        shady_N[pixel_M] = encode(shaded.ambient_3M)
        image_N[pixel_M] = encode(shaded.ambient_3M + shaded.direct_3M * lit_M)
        depth_N, lit_N = np.full(len(direction_N3), np.inf), np.zeros(len(direction_N3), bool)
        light_ray_N3 = np.zeros_like(direction_N3)
        depth_N[pixel_M], lit_N[pixel_M] = hits.distance_N[pixel_M], lit_M
        light_ray_N3[pixel_M] = surfaces.point_3M.T - self._shader.light_position_m
        return _Background(
            direction_N3=direction_N3,
            unit_3N=_units(direction_N3.T),
            depth_N=depth_N,
            image_N=image_N,
            shady_N=shady_N,
            lit_N=lit_N,
            light_ray_N3=light_ray_N3,
            light_unit_3N=_units(light_ray_N3.T),
        )

    def _develop(self, view: _View, frame: _Frame, rng: np.random.Generator | None) -> np.ndarray:
        height, width, samples = view.intrinsics.height, view.intrinsics.width, self._samples
        image_HW3 = decode(frame.image_N).reshape(height * samples, width * samples, 3)
        if samples > 1:
            blocks = image_HW3.reshape(height, samples, width, samples, 3)
            image_HW3 = (blocks.mean((1, 3), dtype=np.float32) + np.float32(0.5)).astype(np.uint8)
        return np.ascontiguousarray(image_HW3) if rng is None else self._noise.add(image_HW3, rng)


def _finer(camera: PixelIntrinsics, samples: int) -> PixelIntrinsics:
    return PixelIntrinsics(
        camera.fx * samples,
        camera.fy * samples,
        camera.cx * samples,
        camera.cy * samples,
        width=camera.width * samples,
        height=camera.height * samples,
    )


def _surfaces(pose: CameraPose, direction_N3: np.ndarray, hits: Hits, chosen_M: np.ndarray) -> Surfaces:
    assert hits.normal_N3 is not None
    to_surface_3M = direction_N3.take(chosen_M, 0).T * hits.distance_N.take(chosen_M)
    return Surfaces(
        geom_M=hits.geom_N.take(chosen_M),
        point_3M=pose.position_m[:, None] + to_surface_3M,
        normal_3M=hits.normal_N3.take(chosen_M, 0).T.astype(np.float32, order="C"),
        to_eye_3M=-to_surface_3M.astype(np.float32, order="C"),
    )


def _units(vector_3N: np.ndarray) -> np.ndarray:
    x, y, z = single_3N = vector_3N.astype(np.float32, order="C")
    # A pixel without a surface has the vector 0, and no direction.
    return single_3N / np.maximum(np.sqrt(x * x + y * y + z * z), np.float32(1e-12))


def _in_cones(unit_3N: np.ndarray, centre_K3: np.ndarray, radius_K: np.ndarray) -> np.ndarray:
    """Return which directions may meet a sphere, for spheres around `centre_K3` as seen from the origin."""
    distance_K = np.linalg.norm(centre_K3, axis=1)
    sine_K = np.minimum(SPHERE_MARGIN * radius_K / np.maximum(distance_K, 1e-12), 1)
    # A sphere around the origin is met in every direction.
    threshold_K = np.where(sine_K < 1, np.sqrt(1 - sine_K**2), -2)
    direction_K3 = centre_K3 / np.maximum(distance_K, 1e-12)[:, None]
    cosine_KN = direction_K3.astype(np.float32) @ unit_3N
    return (cosine_KN >= threshold_K[:, None].astype(np.float32)).any(0)
