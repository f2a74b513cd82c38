"""A random scene: which objects lie where, the cameras, the light and the materials; compiled into a MuJoCo model.

World frame = the robot's base frame: z up with the table top at z = 0, x forward away from the robot, y to its
left. Lengths in metres, angles in radians.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import mujoco
import numpy as np

from spear_lightning.errors import ConfigError
from spear_lightning.geometry.cameras import PixelIntrinsics
from spear_lightning.worlds.tabletop.gripper import HAND, add_grip, add_gripper
from spear_lightning.worlds.tabletop.materials import draw_look
from spear_lightning.worlds.tabletop.objects import ObjectSpec
from spear_lightning.worlds.tabletop.ray_camera import CameraPose
from spear_lightning.worlds.tabletop.shading import Look
from spear_lightning.worlds.tabletop.tasks import Task, draw_distractors

TABLE_LOW_M, TABLE_HIGH_M = np.array([0.05, -0.35]), np.array([0.65, 0.35])
"""Edges of the table, x and y."""

AREA_LOW_M, AREA_HIGH_M = np.array([0.24, -0.17]), np.array([0.48, 0.17])
"""Where the middles of objects may lie, x and y."""

START_LOW_M, START_HIGH_M = np.array([0.26, -0.12, 0.16]), np.array([0.44, 0.12, 0.24])
"""Where the tool starts."""

START_YAW = 0.5
"""The tool starts turned by at most this."""

TIMESTEP_S = 0.005

_FINGER_ROOM_M = 0.062
_GAP_M = 0.02


@dataclass(frozen=True)
class CameraPlace:
    """Where a camera stands on average.

    Attributes:
        mount: Body it is fixed to: "world", or the hand.
        position_m: Where it is, in the frame of its mount.
        looks_at_m: A point on its optical axis, in the frame of its mount.
        up: Direction that is up in the picture, in the frame of its mount.
        field_of_view: Vertical field of view, radians.
        jitter_m: Largest random shift of position and of the point looked at, along each axis.
    """

    mount: str
    position_m: tuple[float, float, float]
    looks_at_m: tuple[float, float, float]
    up: tuple[float, float, float]
    field_of_view: float
    jitter_m: float


CAMERAS: dict[str, CameraPlace] = {
    "primary": CameraPlace("world", (0.88, 0.0, 0.50), (0.34, 0.0, 0.06), (0, 0, 1), np.deg2rad(42), 0.03),
    "secondary": CameraPlace("world", (0.34, 0.62, 0.40), (0.35, 0.0, 0.06), (0, 0, 1), np.deg2rad(42), 0.03),
    "wrist": CameraPlace(HAND, (-0.07, 0.0, 0.085), (-0.005, 0.0, -0.02), (1, 0, 0), np.deg2rad(66), 0.0),
}
"""Two cameras beside the table and one at the hand."""


@dataclass(frozen=True)
class CameraView:
    """Where a camera is and what it sees.

    Attributes:
        intrinsics: Of its image.
        mount: Body it is fixed to.
        position_m: (3,) in the frame of its mount.
        rotation: (3, 3) from the camera's frame (OpenCV: x right, y down, z forward) to that of its mount.
    """

    intrinsics: PixelIntrinsics
    mount: str
    position_m: np.ndarray
    rotation: np.ndarray

    def pose(self, data: mujoco.MjData) -> CameraPose:
        """Return where the camera is in the current state."""
        mount = data.body(self.mount)
        axes = mount.xmat.reshape(3, 3)
        return CameraPose(mount.xpos + axes @ self.position_m, axes @ self.rotation)


@dataclass
class Scene:
    """Everything that is drawn from one seed.

    Attributes:
        task: What is to be done; its objects come first among `objects`.
        objects: All objects; number i is the body `object_name(i)`.
        model: The compiled model; its initial state has everything in place.
        cameras: Camera name -> where it is.
        look: Materials and light.
    """

    task: Task
    objects: tuple[ObjectSpec, ...]
    model: mujoco.MjModel
    cameras: dict[str, CameraView]
    look: Look


def object_name(index: int) -> str:
    """Return the name of an object's body."""
    return f"object_{index}"


def build_scene(
    task: Task,
    rng: np.random.Generator,
    image_sizes: Mapping[str, tuple[int, int]],
    distractors: tuple[int, int] = (1, 2),
    plain: bool = False,
) -> Scene:
    """Draw the rest of a scene around a task and compile it.

    Args:
        task: What it is about.
        rng: Source of everything else.
        image_sizes: Camera name (a key of `CAMERAS`) -> width and height in pixels.
        distractors: Fewest and most objects that the task is not about.
        plain: One table, one light, cameras always in the same place.

    Raises:
        ConfigError: If a camera does not exist.
    """
    unknown = sorted(set(image_sizes) - set(CAMERAS))
    if unknown:
        raise ConfigError("The tabletop world has no such camera", found=unknown, expected=f"of {sorted(CAMERAS)}")
    others = draw_distractors(task, int(rng.integers(distractors[0], distractors[1] + 1)), rng)
    objects, places_N2 = lay_out([*task.objects, *others], rng)
    yaws = [*task.yaws, *rng.uniform(-np.pi, np.pi, len(objects) - len(task.objects))]
    spec = _empty_table()
    for index, (thing, place, yaw) in enumerate(zip(objects, places_N2, yaws, strict=True)):
        _add_object(spec, object_name(index), thing, place, float(yaw))
    add_gripper(spec, rng.uniform(START_LOW_M, START_HIGH_M), float(rng.uniform(-START_YAW, START_YAW)))
    for index in range(len(objects)):
        add_grip(spec, object_name(index))
    jitter = 0.0 if plain else 1.0
    cameras = {name: draw_camera(CAMERAS[name], *size, rng, jitter) for name, size in image_sizes.items()}
    model = spec.compile()
    return Scene(task, objects, model, cameras, Look.plain(model) if plain else draw_look(model, rng))


def lay_out(objects: Sequence[ObjectSpec], rng: np.random.Generator) -> tuple[tuple[ObjectSpec, ...], np.ndarray]:
    """Find places where objects lie apart, with room for the fingers around what can be grasped.

    Distractors for which there is no room (the last ones) are left out.

    Args:
        objects: What is to be placed, in order.
        rng: Source of the places.

    Returns:
        The objects that found a place, and (N, 2) their middles, x and y.
    """
    placed: list[np.ndarray] = []
    kept: list[ObjectSpec] = []
    for thing in objects:
        for place in rng.uniform(AREA_LOW_M, AREA_HIGH_M, (100, 2)):
            if all(np.linalg.norm(place - p) > _distance(thing, o) for p, o in zip(placed, kept, strict=True)):
                placed.append(place)
                kept.append(thing)
                break
        else:
            if len(kept) < 2:
                # The task's own objects always fit; a bad first draw is made again.
                return lay_out(objects, rng)
            break
    return tuple(kept), np.array(placed)


def _distance(first: ObjectSpec, second: ObjectSpec) -> float:
    apart = first.radius_m + second.radius_m + _GAP_M
    for thing, other in ((first, second), (second, first)):
        if thing.grasps:
            apart = max(apart, other.radius_m + _FINGER_ROOM_M)
    return apart


def _empty_table() -> mujoco.MjSpec:
    spec = mujoco.MjSpec()
    spec.option.timestep = TIMESTEP_S
    spec.option.integrator = mujoco.mjtIntegrator.mjINT_IMPLICITFAST
    spec.option.cone = mujoco.mjtCone.mjCONE_ELLIPTIC
    spec.option.impratio = 5.0
    spec.option.iterations = 30
    middle, half = (TABLE_LOW_M + TABLE_HIGH_M) / 2, (TABLE_HIGH_M - TABLE_LOW_M) / 2
    spec.worldbody.add_geom(
        name="table",
        type=mujoco.mjtGeom.mjGEOM_BOX,
        pos=[*middle, -0.02],
        size=[*half, 0.02],
        rgba=[0.62, 0.50, 0.36, 1.0],
        friction=[1.0, 0.01, 0.001],
    )
    spec.worldbody.add_geom(
        name="floor",
        type=mujoco.mjtGeom.mjGEOM_BOX,
        pos=[*middle, -0.75],
        size=[2.0, 2.0, 0.05],
        rgba=[0.40, 0.42, 0.45, 1.0],
        contype=0,
        conaffinity=0,
    )
    return spec


_GEOMS = {
    "box": mujoco.mjtGeom.mjGEOM_BOX,
    "cylinder": mujoco.mjtGeom.mjGEOM_CYLINDER,
    "ellipsoid": mujoco.mjtGeom.mjGEOM_ELLIPSOID,
    "capsule": mujoco.mjtGeom.mjGEOM_CAPSULE,
}
_HALF = np.sqrt(0.5)
_AXIS_WXYZ = {"z": (1.0, 0, 0, 0), "x": (_HALF, 0, _HALF, 0), "y": (_HALF, -_HALF, 0, 0)}


def _add_object(spec: mujoco.MjSpec, name: str, thing: ObjectSpec, place: np.ndarray, yaw: float) -> None:
    body = spec.worldbody.add_body(
        name=name,
        pos=[*place, thing.half_extents_m[2] + 0.0005],
        quat=[np.cos(yaw / 2), 0, 0, np.sin(yaw / 2)],
    )
    joint = body.add_freejoint()
    joint.name = name
    for number, geom in enumerate(thing.geoms):
        body.add_geom(
            name=f"{name}_{number}",
            type=_GEOMS[geom.shape],
            size=[*geom.size_m, *[0.0] * (3 - len(geom.size_m))],
            pos=geom.position_m,
            quat=_AXIS_WXYZ[geom.axis],
            rgba=[*(geom.rgb or thing.rgb), 1.0],
            density=400.0,
            # Rolling friction keeps eggs and pills from rolling off at a touch.
            friction=[1.0, 0.01, 0.002],
            condim=6,
        )


def draw_camera(
    place: CameraPlace, width: int, height: int, rng: np.random.Generator, jitter: float = 1.0
) -> CameraView:
    """Return a camera near its average place.

    Args:
        place: Where it stands on average.
        width: Columns of its image.
        height: Rows of its image.
        rng: Source of the jitter.
        jitter: Share of the place's own jitter.
    """
    reach_m = jitter * place.jitter_m
    position = np.array(place.position_m) + rng.uniform(-reach_m, reach_m, 3)
    target = np.array(place.looks_at_m) + 0.5 * rng.uniform(-reach_m, reach_m, 3)
    focal = height / 2 / np.tan(place.field_of_view / 2)
    intrinsics = PixelIntrinsics(focal, focal, width / 2, height / 2, width, height)
    return CameraView(intrinsics, place.mount, position, look_at(position, target, np.array(place.up)))


def look_at(position_m: np.ndarray, target_m: np.ndarray, up: np.ndarray) -> np.ndarray:
    """Return the rotation (3, 3) of a camera (OpenCV axes as columns) that looks from one point to another.

    Args:
        position_m: (3,) the camera.
        target_m: (3,) what is in the middle of its picture.
        up: (3,) the direction that is up in the picture; not along the line of sight.
    """
    forward = (target_m - position_m) / np.linalg.norm(target_m - position_m)
    right = np.cross(forward, up)
    right /= np.linalg.norm(right)
    return np.stack([right, np.cross(forward, right), forward], axis=1)
