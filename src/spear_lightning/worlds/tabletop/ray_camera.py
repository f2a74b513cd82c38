"""What each pixel of a camera sees, by MuJoCo's own ray casting: no display, no OpenGL.

The camera frame is OpenCV's: x right, y down, z forward. A camera's rotation turns camera coordinates into world
coordinates. Pixel centres are at +0.5 (see `geometry.cameras`).

Shape letters: N rays, H and W the image.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import IntEnum

import mujoco
import numpy as np

from spear_lightning.geometry.cameras import PixelIntrinsics

NOTHING = -1
"""The geom id of a ray that hits nothing."""

NO_CUTOFF_M = 1e10

ENDLESS_M = 1e6
"""The radius of a plane."""

PLANE = mujoco.mjtGeom.mjGEOM_PLANE

MOST_SPHERES = 32
"""At most so many spheres cover a geom."""

ROUND = (mujoco.mjtGeom.mjGEOM_SPHERE, mujoco.mjtGeom.mjGEOM_CAPSULE, mujoco.mjtGeom.mjGEOM_ELLIPSOID)
"""Shapes that lie within a round tube along the longest side of their box."""


@dataclass(frozen=True)
class CameraPose:
    """Where a camera is.

    Attributes:
        position_m: (3,) in the world frame.
        rotation: (3, 3) camera frame (OpenCV) -> world frame.
    """

    position_m: np.ndarray
    rotation: np.ndarray

    def copy(self) -> CameraPose:
        """Return a pose that stays what it is when the simulation writes into the arrays of this one."""
        return CameraPose(self.position_m.copy(), self.rotation.copy())

    def same_as(self, other: CameraPose | None) -> bool:
        """Return whether both are the same to the last bit."""
        return (
            other is not None
            and np.array_equal(self.position_m, other.position_m)
            and np.array_equal(self.rotation, other.rotation)
        )


class Part(IntEnum):
    """A part of a scene that can be looked at by itself; the values are MuJoCo's geom groups in a private copy."""

    STATIC = 0
    MOVING = 1
    HIDDEN = 5


STATIC, MOVING, ALL = (Part.STATIC,), (Part.MOVING,), (Part.STATIC, Part.MOVING)


@dataclass(frozen=True)
class Hits:
    """What N rays hit first.

    Attributes:
        geom_N: int32 geom ids, -1 where nothing is hit.
        distance_N: float64, in lengths of the ray's direction vector; -1 where nothing is hit.
        normal_N3: float64 outward unit normals in the world frame; zero where nothing is hit; None if they were
            not asked for.
    """

    geom_N: np.ndarray
    distance_N: np.ndarray
    normal_N3: np.ndarray | None


class RayCaster:
    """Casts many rays from one point into a scene.

    Args:
        model: The scene. Sizes, groups and transparency of its geoms must not change afterwards.
        hidden_groups: Geom groups that cameras and shadows pass through, for geoms that only collide.
            Geoms of alpha 0 are never seen either.
        only: Geom ids; what is not among them is not there. Default: all are there.
    """

    def __init__(
        self,
        model: mujoco.MjModel,
        hidden_groups: Collection[int] = (),
        only: Sequence[int] | np.ndarray | None = None,
    ) -> None:
        body = model.geom_bodyid
        # A mocap body has no joint, but moves all the same.
        moving = (model.body_weldid[body] != 0) | (model.body_mocapid[model.body_rootid[body]] >= 0)
        hidden = np.isin(model.geom_group, list(hidden_groups))
        if only is not None:
            hidden |= ~np.isin(np.arange(model.ngeom), only)
        # mj_multiRay can leave out geoms by their group alone: a copy of the model has groups that serve us.
        self._model = copy.copy(model)
        self._model.geom_group[:] = np.where(hidden, Part.HIDDEN, np.where(moving, Part.MOVING, Part.STATIC))
        _grow_bounds(self._model)
        self._geom_K, self._local_K3, self._radius_K = _cover(model, np.flatnonzero(moving & ~hidden))
        self.static_geoms = np.flatnonzero(~moving & ~hidden)

    def moving_spheres(self, data: mujoco.MjData) -> tuple[np.ndarray, np.ndarray]:
        """Return spheres that together hold everything that can move: centres (K, 3) and radii (K,), metres."""
        axes_K33 = data.geom_xmat[self._geom_K].reshape(-1, 3, 3)
        return data.geom_xpos[self._geom_K] + np.einsum("kij,kj->ki", axes_K33, self._local_K3), self._radius_K

    def cast(
        self,
        data: mujoco.MjData,
        origin: np.ndarray,
        direction_N3: np.ndarray,
        parts: tuple[Part, ...] = ALL,
        normals: bool = True,
    ) -> Hits:
        """Cast rays.

        Args:
            data: The state; `mujoco.mj_forward` or a step must have computed its positions.
            origin: (3,) where all rays start, metres, world frame.
            direction_N3: Directions of any length, world frame.
            parts: Which geoms are there.
            normals: Whether to give the normals of the surfaces.

        Returns:
            What each ray hits first.
        """
        count = len(direction_N3)
        geom_N, distance_N = np.empty(count, np.int32), np.empty(count)
        normal_N3 = np.empty((count, 3)) if normals else None
        if count:
            groups = np.zeros(mujoco.mjNGROUP, np.uint8)
            groups[list(parts)] = 1
            mujoco.mj_multiRay(
                self._model,
                data,
                np.asarray(origin, np.float64),
                np.ascontiguousarray(direction_N3, np.float64).reshape(-1),
                groups,
                1,
                -1,
                geom_N,
                distance_N,
                None if normal_N3 is None else normal_N3.reshape(-1),
                count,
                NO_CUTOFF_M,
            )
        return Hits(geom_N, distance_N, normal_N3)

    def static_boxes(self, data: mujoco.MjData) -> tuple[np.ndarray, np.ndarray]:
        """Return the boxes around `static_geoms` along the axes of the world: lower and upper corners (S, 3)."""
        geoms = self.static_geoms
        box_S6, axes_S33 = self._model.geom_aabb[geoms], data.geom_xmat[geoms].reshape(-1, 3, 3)
        middle_S3 = data.geom_xpos[geoms] + np.einsum("sij,sj->si", axes_S33, box_S6[:, :3])
        half_S3 = np.einsum("sij,sj->si", np.abs(axes_S33), box_S6[:, 3:])
        half_S3[self._model.geom_type[geoms] == PLANE] = np.inf
        return middle_S3 - half_S3, middle_S3 + half_S3


def _grow_bounds(model: mujoco.MjModel) -> None:
    # mj_multiRay passes over a body whose bounding box is missed, and that box holds only geoms that can collide.
    # It looks at the ball around the box, so a ball around all geoms of the body is written there.
    for body in range(model.nbody):
        geoms = np.flatnonzero(model.geom_bodyid == body)
        node = model.body_bvhadr[body]
        if node >= 0 and len(geoms):
            distances_m = np.linalg.norm(model.geom_pos[geoms] - model.body_ipos[body], axis=1)
            radii_m = np.where(model.geom_type[geoms] == PLANE, ENDLESS_M, model.geom_rbound[geoms])
            model.bvh_aabb[node] = 0, 0, 0, (distances_m + radii_m).max(), 0, 0


def _cover(model: mujoco.MjModel, geoms: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    # A row of spheres along the longest side of each geom's box: one around a whole arm would be mostly air.
    owners, centres, radii = [], [], []
    for geom in geoms:
        middle, half = model.geom_aabb[geom, :3], model.geom_aabb[geom, 3:]
        longest = int(np.argmax(half))
        across = np.delete(half, longest)
        kind = model.geom_type[geom]
        is_round = kind in ROUND or (kind == mujoco.mjtGeom.mjGEOM_CYLINDER and longest == 2)
        width = across.max() if is_round else np.linalg.norm(across)
        count = int(np.clip(np.ceil(2 * half[longest] / width), 1, MOST_SPHERES))
        piece = half[longest] / count
        for number in range(count):
            centre = middle.copy()
            centre[longest] += (2 * number + 1) * piece - half[longest]
            owners.append(geom)
            centres.append(centre)
            radii.append(np.hypot(width, piece))
    return np.array(owners, int), np.reshape(centres, (-1, 3)), np.array(radii)


@dataclass(frozen=True)
class RayImage:
    """The geometry that a camera sees.

    Attributes:
        geom_HW: int32 MuJoCo geom ids, -1 where nothing is.
        hit_HW: bool, whether there is a surface.
        depth_HW: float32 z coordinates in the camera frame, metres; inf where nothing is.
        points_HW3: float32 surface points in the camera frame, metres; inf where nothing is.
        normals_HW3: float32 outward unit normals in the world frame; zero where nothing is.
    """

    geom_HW: np.ndarray
    hit_HW: np.ndarray
    depth_HW: np.ndarray
    points_HW3: np.ndarray
    normals_HW3: np.ndarray


def pixel_rays(intrinsics: PixelIntrinsics) -> np.ndarray:
    """Return the rays through the pixel centres, row by row: float64 (H * W, 3) with z = 1, camera frame.

    With z = 1 the distance along a ray is the depth.
    """
    u = (np.arange(intrinsics.width) + 0.5 - intrinsics.cx) / intrinsics.fx
    v = (np.arange(intrinsics.height) + 0.5 - intrinsics.cy) / intrinsics.fy
    rays = np.ones((intrinsics.height, intrinsics.width, 3))
    rays[..., 0] = u
    rays[..., 1] = v[:, None]
    return rays.reshape(-1, 3)


class RayCamera:
    """A pinhole camera that sees geometry: geom ids, depth, points and normals.

    Args:
        model: The scene (see `RayCaster`).
        intrinsics: The camera.
        hidden_groups: Geom groups the camera does not see.
    """

    def __init__(
        self, model: mujoco.MjModel, intrinsics: PixelIntrinsics, hidden_groups: Collection[int] = ()
    ) -> None:
        self.intrinsics = intrinsics
        self._caster = RayCaster(model, hidden_groups)
        self._rays_N3 = pixel_rays(intrinsics)

    def see(self, data: mujoco.MjData, pose: CameraPose) -> RayImage:
        """Look at a state.

        Args:
            data: The state; its positions must have been computed.
            pose: Where the camera is.

        Returns:
            What each pixel's centre sees.
        """
        hits = self._caster.cast(data, pose.position_m, self._rays_N3 @ pose.rotation.T)
        hit_N = hits.geom_N >= 0
        depth_N = np.where(hit_N, hits.distance_N, np.inf)
        points_N3 = np.full(self._rays_N3.shape, np.inf, np.float32)
        points_N3[hit_N] = self._rays_N3[hit_N] * depth_N[hit_N, None]
        assert hits.normal_N3 is not None
        shape = (self.intrinsics.height, self.intrinsics.width)
        return RayImage(
            geom_HW=hits.geom_N.reshape(shape),
            hit_HW=hit_N.reshape(shape),
            depth_HW=depth_N.astype(np.float32).reshape(shape),
            points_HW3=points_N3.reshape(*shape, 3),
            normals_HW3=hits.normal_N3.astype(np.float32).reshape(*shape, 3),
        )
