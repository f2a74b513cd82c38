"""Pictures of all cameras of a moment, by ray casting: colour, texture, shadow; no display, no OpenGL.

Most of a picture from a fixed camera never changes: the table, the floor, their shadows. From the second picture
on that a camera takes from one place, this background is kept, and rays are cast only where something that moves
may be seen, or may throw its shadow: where spheres around the moving geoms lie as seen from the camera and from
the light (see `coverage`).

Shape letters: N pixels of a camera, M surface points, R background pixels that may lie in a shadow, K spheres.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import mujoco
import numpy as np

from spear_lightning.geometry.cameras import PixelIntrinsics
from spear_lightning.worlds.tabletop.coverage import CoverageGrid
from spear_lightning.worlds.tabletop.ray_camera import (
    ALL,
    MOVING,
    STATIC,
    CameraPose,
    Hits,
    RayCaster,
    pixel_rays,
)
from spear_lightning.worlds.tabletop.shading import Look, SensorNoise, Shader, Surfaces, decode, encode
from spear_lightning.worlds.tabletop.shadows import Shadows


@dataclass(frozen=True)
class _Background:
    """A fixed camera's picture of everything that cannot move; pixels are those of `shading.encode`."""

    direction_N3: np.ndarray  # float64, world frame, one unit of depth long
    depth_N: np.ndarray  # float64, inf where nothing is
    image_N: np.ndarray  # with the shadows of what cannot move
    shady_N: np.ndarray  # all in the shadow
    lit_N: np.ndarray  # bool, whether the light reaches it
    light_ray_N3: np.ndarray  # float64, from the light to the surface
    light_cell_N: np.ndarray  # where the light sees the surface (see `Shadows.cells`)


@dataclass
class _View:
    """A camera: its rays, where it was last, and what it has seen there of the background."""

    intrinsics: PixelIntrinsics
    grid: CoverageGrid
    ray_N3: np.ndarray
    pose: CameraPose | None = None
    background: _Background | None = None


@dataclass(frozen=True)
class _Moment:
    """What all cameras share: the state, spheres around what moves, and where their shadows may fall."""

    data: mujoco.MjData
    centre_K3: np.ndarray
    radius_K: np.ndarray
    shaded_cells: np.ndarray


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
        self._shadows = Shadows(self._caster, self._shader.light_position_m)
        self._noise = SensorNoise(noise)
        self._samples = supersampling
        self._views = {}
        for name, camera in cameras.items():
            finer = _finer(camera, supersampling)
            self._views[name] = _View(camera, CoverageGrid(finer), pixel_rays(finer))

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
        centre_K3, radius_K = self._caster.moving_spheres(data)
        moment = _Moment(data, centre_K3, radius_K, self._shadows.shaded_cells(centre_K3, radius_K))
        frames = [self._look(moment, self._views[name], pose) for name, pose in poses.items()]
        self._colour(moment, frames)
        return {
            name: self._develop(self._views[name], frame, rng) for name, frame in zip(poses, frames, strict=True)
        }

    def _look(self, moment: _Moment, view: _View, pose: CameraPose) -> _Frame:
        if not pose.same_as(view.pose):
            view.pose, view.background = pose.copy(), None
            return self._look_everywhere(moment, view, pose)
        if view.background is None:
            view.background = self._paint_background(moment.data, view, pose)
        return self._look_at_moving(moment, view, pose, view.background)

    def _look_everywhere(self, moment: _Moment, view: _View, pose: CameraPose) -> _Frame:
        direction_N3 = view.ray_N3 @ pose.rotation.T
        hits = self._caster.cast(moment.data, pose.position_m, direction_N3, ALL)
        seen_N = hits.geom_N >= 0
        pixel_M = np.flatnonzero(seen_N)
        image_N = np.zeros(len(direction_N3), np.uint32)
        if len(pixel_M) < len(image_N):
            image_N[~seen_N] = encode(self._shader.sky(direction_N3[~seen_N].T))
        surfaces = _surfaces(pose, direction_N3, hits, pixel_M)
        return _Frame(image_N, pixel_M, surfaces, pixel_M[:0], direction_N3[:0], image_N[:0])

    def _look_at_moving(self, moment: _Moment, view: _View, pose: CameraPose, background: _Background) -> _Frame:
        covered = view.grid.covered((moment.centre_K3 - pose.position_m) @ pose.rotation, moment.radius_K)
        candidate = np.flatnonzero(covered[:-1])
        direction_N3 = background.direction_N3.take(candidate, 0)
        hits = self._caster.cast(moment.data, pose.position_m, direction_N3, MOVING)
        nearer = np.flatnonzero((hits.geom_N >= 0) & (hits.distance_N < background.depth_N.take(candidate)))
        pixel_M = candidate.take(nearer)
        exposed_N = background.lit_N & moment.shaded_cells.take(background.light_cell_N)
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

    def _colour(self, moment: _Moment, frames: list[_Frame]) -> None:
        # All cameras together: the fixed costs of a few dozen array operations are paid once.
        surfaces = Surfaces.joined([frame.surfaces for frame in frames])
        shaded = self._shader.shade(moment.data, surfaces)
        facing, lit_M = np.flatnonzero(shaded.facing_M), shaded.facing_M.copy()
        lit_M[facing], arrived = self._shadows.lit(
            moment.data,
            surfaces.point_3M.take(facing, 1),
            surfaces.geom_M.take(facing),
            ALL,
            moment.shaded_cells,
            np.concatenate([frame.receiver_ray_R3 for frame in frames]),
        )
        colour_M = encode(shaded.ambient_3M + shaded.direct_3M * lit_M)
        surface, receiver = 0, 0
        for frame in frames:
            count, receivers = len(frame.pixel_M), len(frame.receiver_R)
            frame.image_N[frame.pixel_M] = colour_M[surface : surface + count]
            dark = np.flatnonzero(~arrived[receiver : receiver + receivers])
            frame.image_N[frame.receiver_R.take(dark)] = frame.receiver_shady_R.take(dark)
            surface, receiver = surface + count, receiver + receivers

    def _paint_background(self, data: mujoco.MjData, view: _View, pose: CameraPose) -> _Background:
        direction_N3 = view.ray_N3 @ pose.rotation.T
        hits = self._caster.cast(data, pose.position_m, direction_N3, STATIC)
        pixel_M = np.flatnonzero(hits.geom_N >= 0)
        surfaces = _surfaces(pose, direction_N3, hits, pixel_M)
        shaded = self._shader.shade(data, surfaces)
        lit_M, _ = self._shadows.lit(data, surfaces.point_3M, surfaces.geom_M, STATIC, None, direction_N3[:0])
        lit_M &= shaded.facing_M
        shady_N = encode(self._shader.sky(direction_N3.T))
        image_N = shady_N.copy()
        shady_N[pixel_M] = encode(shaded.ambient_3M)
        image_N[pixel_M] = encode(shaded.ambient_3M + shaded.direct_3M * lit_M)
        depth_N, lit_N = np.full(len(direction_N3), np.inf), np.zeros(len(direction_N3), bool)
        light_ray_N3, light_cell_N = np.zeros_like(direction_N3), np.zeros(len(direction_N3), np.int64)
        depth_N[pixel_M], lit_N[pixel_M] = hits.distance_N[pixel_M], lit_M
        light_ray_N3[pixel_M] = self._shadows.rays(surfaces.point_3M)
        light_cell_N[pixel_M] = self._shadows.cells(surfaces.point_3M)
        return _Background(direction_N3, depth_N, image_N, shady_N, lit_N, light_ray_N3, light_cell_N)

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
