"""What can lie on the table: shapes in varied sizes, how a parallel gripper takes hold of them, and colours.

An object's own frame has its origin in the middle of its bounding box and z up when it stands on the table.
Lengths are in metres, angles in radians.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

Shape = Literal["box", "cylinder", "ellipsoid", "capsule"]
Axis = Literal["x", "y", "z"]
Rgb = tuple[float, float, float]

COLOURS: dict[str, Rgb] = {
    "red": (0.80, 0.10, 0.10),
    "green": (0.10, 0.55, 0.15),
    "blue": (0.10, 0.22, 0.80),
    "yellow": (0.90, 0.78, 0.08),
    "purple": (0.48, 0.14, 0.60),
    "orange": (0.95, 0.42, 0.05),
    "cyan": (0.10, 0.70, 0.75),
    "white": (0.90, 0.90, 0.90),
}
"""Colour word -> screen (sRGB) colour in [0, 1], as an image shows it under white light."""

_FRONT: Rgb = (0.05, 0.05, 0.05)


@dataclass(frozen=True)
class GeomSpec:
    """One convex piece of an object.

    Attributes:
        shape: MuJoCo's geom type.
        size_m: Half sizes as MuJoCo takes them: box (x, y, z), ellipsoid (x, y, z), cylinder and capsule
            (radius, half length of the straight part along its axis).
        position_m: Middle of the piece in the object's frame.
        axis: Which axis of the object's frame a cylinder's or capsule's own axis lies along.
        rgb: Colour in [0, 1]; `None` takes the object's.
    """

    shape: Shape
    size_m: tuple[float, ...]
    position_m: tuple[float, float, float] = (0.0, 0.0, 0.0)
    axis: Axis = "z"
    rgb: Rgb | None = None

    def half_extents_m(self) -> np.ndarray:
        """Return half the size of the piece's bounding box along the object's axes, (3,)."""
        if self.shape in ("box", "ellipsoid"):
            return np.array(self.size_m)
        radius, half_length = self.size_m
        along = half_length + (radius if self.shape == "capsule" else 0.0)
        return np.array([along if axis == self.axis else radius for axis in ("x", "y", "z")])


@dataclass(frozen=True)
class Grasp:
    """A way to take hold of an object from above.

    Attributes:
        point_m: Where the middle between the fingertips goes, in the object's frame.
        yaw: Turn of the gripper about the vertical relative to the object; at 0 the fingers close along the
            object's y. A gripper turned by pi grasps alike.
        any_yaw: The object is round: every yaw will do.
    """

    point_m: tuple[float, float, float] = (0.0, 0.0, 0.0)
    yaw: float = 0.0
    any_yaw: bool = False


@dataclass(frozen=True)
class ObjectSpec:
    """A rigid object: one body of one or several pieces.

    Attributes:
        name: Colour and noun, e.g. "red cube": what instructions and labels call it; unique in a scene.
        noun: The kind of object.
        geoms: Its pieces.
        rgb: Its colour.
        half_extents_m: Half the size of its bounding box, which is centred on the origin of its frame.
        grasps: Ways to take hold of it; empty for what only lies there, such as a plate.
    """

    name: str
    noun: str
    geoms: tuple[GeomSpec, ...]
    rgb: Rgb
    half_extents_m: tuple[float, float, float]
    grasps: tuple[Grasp, ...]

    @property
    def radius_m(self) -> float:
        """Radius of the circle that the object's outline fits into, seen from above."""
        return float(np.hypot(*self.half_extents_m[:2]))


def make_object(noun: str, colour: str, rng: np.random.Generator) -> ObjectSpec:
    """Return an object of a kind (a key of `NOUNS`) in a random size.

    Args:
        noun: Kind of object.
        colour: A key of `COLOURS`.
        rng: Source of its size.
    """
    geoms, grasps = NOUNS[noun](rng)
    low = np.min([np.array(geom.position_m) - geom.half_extents_m() for geom in geoms], axis=0)
    high = np.max([np.array(geom.position_m) + geom.half_extents_m() for geom in geoms], axis=0)
    middle = (low + high) / 2
    return ObjectSpec(
        name=f"{colour} {noun}",
        noun=noun,
        geoms=tuple(replace(geom, position_m=_shift(geom.position_m, middle)) for geom in geoms),
        rgb=COLOURS[colour],
        half_extents_m=_triple((high - low) / 2),
        grasps=tuple(replace(grasp, point_m=_shift(grasp.point_m, middle)) for grasp in grasps),
    )


def _shift(point: tuple[float, float, float], middle: np.ndarray) -> tuple[float, float, float]:
    return _triple(np.array(point) - middle)


def _triple(values: np.ndarray) -> tuple[float, float, float]:
    x, y, z = (float(value) for value in values)
    return x, y, z


_Parts = tuple[list[GeomSpec], list[Grasp]]
_QUARTER = np.pi / 2


def _cube(rng: np.random.Generator) -> _Parts:
    half = rng.uniform(0.018, 0.024)
    return [GeomSpec("box", (half, half, half))], [Grasp(), Grasp(yaw=_QUARTER)]


def _brick(rng: np.random.Generator) -> _Parts:
    size = (rng.uniform(0.030, 0.042), rng.uniform(0.014, 0.022), rng.uniform(0.014, 0.022))
    return [GeomSpec("box", size)], [Grasp()]


def _can(rng: np.random.Generator) -> _Parts:
    size = (rng.uniform(0.018, 0.026), rng.uniform(0.024, 0.038))
    return [GeomSpec("cylinder", size)], [Grasp(any_yaw=True)]


def _egg(rng: np.random.Generator) -> _Parts:
    size = (rng.uniform(0.026, 0.034), rng.uniform(0.019, 0.024), rng.uniform(0.018, 0.022))
    return [GeomSpec("ellipsoid", size)], [Grasp()]


def _pill(rng: np.random.Generator) -> _Parts:
    size = (rng.uniform(0.016, 0.021), rng.uniform(0.018, 0.028))
    return [GeomSpec("capsule", size, axis="x")], [Grasp()]


def _hammer(rng: np.random.Generator) -> _Parts:
    length, across = rng.uniform(0.036, 0.046), rng.uniform(0.024, 0.032)
    handle = GeomSpec("box", (length, 0.009, 0.011))
    head = GeomSpec("box", (0.013, across, 0.014), position_m=(length, 0.0, 0.003))
    return [handle, head], [Grasp(point_m=(-0.25 * length, 0.0, 0.0))]


def _mug(rng: np.random.Generator) -> _Parts:
    radius, half_height = rng.uniform(0.020, 0.026), rng.uniform(0.024, 0.032)
    handle = GeomSpec("box", (0.010, 0.005, 0.6 * half_height), position_m=(radius + 0.007, 0.0, 0.0))
    return [GeomSpec("cylinder", (radius, half_height)), handle], [Grasp()]


def _car(rng: np.random.Generator) -> _Parts:
    # Its front (+x) is a dark nose, and its cabin sits at the back.
    half, wide = rng.uniform(0.034, 0.042), rng.uniform(0.017, 0.022)
    return [
        GeomSpec("box", (half, wide, 0.013)),
        GeomSpec("box", (0.010, 0.9 * wide, 0.011), position_m=(half + 0.010, 0.0, -0.002), rgb=_FRONT),
        GeomSpec("box", (0.45 * half, 0.85 * wide, 0.010), position_m=(-0.4 * half, 0.0, 0.023)),
    ], [Grasp()]


def _block(rng: np.random.Generator) -> _Parts:
    half = rng.uniform(0.020, 0.025)
    return [GeomSpec("box", (half, half, half))], [Grasp(), Grasp(yaw=_QUARTER)]


def _plate(rng: np.random.Generator) -> _Parts:
    return [GeomSpec("cylinder", (rng.uniform(0.055, 0.068), 0.006))], []


def _tray(rng: np.random.Generator) -> _Parts:
    return [GeomSpec("box", (rng.uniform(0.052, 0.065), rng.uniform(0.052, 0.065), 0.005))], []


def _stand(rng: np.random.Generator) -> _Parts:
    return [GeomSpec("cylinder", (rng.uniform(0.042, 0.050), rng.uniform(0.012, 0.018)))], []


NOUNS: dict[str, Callable[[np.random.Generator], _Parts]] = {
    "cube": _cube,
    "brick": _brick,
    "can": _can,
    "egg": _egg,
    "pill": _pill,
    "hammer": _hammer,
    "mug": _mug,
    "car": _car,
    "block": _block,
    "plate": _plate,
    "tray": _tray,
    "stand": _stand,
}
"""Noun -> its pieces and grasps at a random size."""

GRASPABLE = ("cube", "brick", "can", "egg", "pill", "hammer", "mug", "car")
"""What the gripper can pick up and put somewhere; a "block" too, but those belong to stacking."""

TARGETS = ("plate", "tray", "stand")
"""What things are put on."""
