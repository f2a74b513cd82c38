"""What the registry says about a data set: its conventions as checked, typed values."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from spear_lightning.errors import ConfigError

GripperRule = Literal["as_is", "binarize_backfill", "relative"]
Format = Literal["rlds", "lerobot"]

ROTATION_WIDTH: dict[str, int] = {"quat_xyzw": 4, "quat_wxyz": 4, "rotvec": 3, "matrix_colmajor": 16}
"""Numbers that each rotation convention takes; Euler angles take three, see `EULER`."""

EULER = re.compile(r"euler_([xyz]{3})_(extrinsic|intrinsic)")
"""Euler angles about the axes named, in the order stored; "extrinsic": the axes stay where they are."""


@dataclass(frozen=True)
class Columns:
    """Some numbers of a step feature: ``value * scale + offset``.

    Attributes:
        key: Step feature, e.g. "observation/state".
        start: First number.
        stop: One past the last number.
        scale: Factor to our unit (metres, openness).
        offset: Added after scaling.
    """

    key: str
    start: int
    stop: int
    scale: float = 1.0
    offset: float = 0.0


@dataclass(frozen=True)
class CameraEntry:
    """Where a camera's images are.

    Attributes:
        key: Step feature.
        optional: Whether it may be missing, or hold dummy pictures in some episodes.
        bgr: Whether the original copy stores blue first.
        size: (height, width) of the original copy.
        encoding: "jpeg" or "png" in the original copy.
    """

    key: str
    optional: bool = False
    bgr: bool = False
    size: tuple[int, int] | None = None
    encoding: str | None = None

    def blue_first(self, size: tuple[int, ...], encoding: str) -> bool:
        """Return whether a copy with pictures of this size and encoding stores blue first.

        Copies that were re-encoded by rlds_dataset_mod, as Octo and OpenVLA use them, were mended on the way.
        """
        original = (self.size is None or self.size == tuple(size[:2])) and (
            self.encoding is None or self.encoding == ("jpeg" if encoding == "jpeg" else "png")
        )
        return self.bgr and original


@dataclass(frozen=True)
class EpisodeFilter:
    """Which episodes are used: those where a feature of the episode is true, or a text that holds another."""

    key: str
    contains: str | None = None


@dataclass(frozen=True)
class IdleFilter:
    """Frames that start no chunk because nothing happens in the next while.

    Attributes:
        seconds: How long the arm and the gripper must stay as they are.
        metres: Motion below it is none.
        radians: Rotation below it is none.
    """

    seconds: float = 1.0
    metres: float = 0.002
    radians: float = 0.01


@dataclass(frozen=True)
class RotationColumns:
    """Numbers that hold a rotation, tool -> base, and in which convention."""

    columns: Columns
    convention: str


@dataclass(frozen=True)
class DatasetEntry:
    """Conventions of one data set; the fields are explained at the top of oxe_registry.yaml."""

    id: str
    name: str
    version: str
    rate_hz: float
    cameras: dict[str, CameraEntry]
    position: Columns
    rotation: Columns
    rotation_convention: str
    gripper_state: Columns | None
    gripper_command: Columns | None
    gripper_rule: GripperRule
    instruction: tuple[str, ...]
    skip_first_steps: int = 0
    format: Format = "rlds"
    same_rotation: RotationColumns | None = None
    base_axes: tuple[str, str, str] | None = None
    drop_zero_position: bool = False
    drop_beyond_m: float | None = None
    episodes: EpisodeFilter | None = None
    idle: IdleFilter | None = None
    position_low_m: tuple[float, ...] | None = None
    position_high_m: tuple[float, ...] | None = None
    confidence: str = "high"

    def required_keys(self) -> dict[str, int]:
        """Return step feature -> how many numbers it must have, for all that the poses are made of."""
        needed: dict[str, int] = {}
        again = self.same_rotation.columns if self.same_rotation else None
        for columns in (self.position, self.rotation, self.gripper_state, self.gripper_command, again):
            if columns is not None:
                needed[columns.key] = max(needed.get(columns.key, 0), columns.stop)
        return needed

    def base_matrix(self) -> np.ndarray:
        """Return the rotation from the recorded base frame to ours, float64 (3, 3)."""
        matrix = np.zeros((3, 3))
        for row, axis in enumerate(self.base_axes or ("x", "y", "z")):
            matrix[row, "xyz".index(axis[-1])] = -1.0 if axis.startswith("-") else 1.0
        return matrix

    def fingerprint(self) -> str:
        """Return a short hash of the conventions: an index made under others is not used."""
        told = {"position_low_m", "position_high_m", "confidence"}
        conventions = {name: value for name, value in asdict(self).items() if name not in told}
        return hashlib.sha256(json.dumps(conventions, sort_keys=True).encode()).hexdigest()[:12]


def rotation_width(convention: str) -> int | None:
    """Return how many numbers a rotation convention takes; None if there is no such convention."""
    return 3 if EULER.fullmatch(convention) else ROTATION_WIDTH.get(convention)


def parse_entry(dataset: str, fields: dict[str, Any], where: str) -> DatasetEntry:
    """Make an entry of its YAML fields.

    Raises:
        ConfigError: If a field is missing, unknown or wrong.
    """
    given = {name: value for name, value in fields.items() if name not in ("source", "robot", "language")}
    try:
        rotation = _rotation(given.pop("rotation"))
        command = dict(given.pop("gripper_command", None) or {})
        rule = command.pop("rule", "as_is")
        low_m, high_m = given.pop("expected_position_m", None) or (None, None)
        entry = DatasetEntry(
            id=dataset,
            version=str(given.pop("version", "")),
            rate_hz=float(given.pop("rate_hz")),
            cameras={name: _camera(camera) for name, camera in given.pop("cameras").items()},
            position=_columns(given.pop("position")),
            rotation=rotation.columns,
            rotation_convention=rotation.convention,
            gripper_state=_optional(_columns, given.pop("gripper_state", None)),
            gripper_command=_columns(command) if command else None,
            gripper_rule=rule,
            instruction=tuple(given.pop("instruction", None) or ()),
            same_rotation=_optional(_rotation, given.pop("same_rotation", None)),
            base_axes=_optional(tuple, given.pop("base_axes", None)),
            episodes=_optional(lambda each: EpisodeFilter(**each), given.pop("episodes", None)),
            idle=_optional(lambda each: IdleFilter(**each), given.pop("idle", None)),
            position_low_m=_optional(tuple, low_m),
            position_high_m=_optional(tuple, high_m),
            **given,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(
            "A registry entry cannot be understood", where=where, found=f"{type(error).__name__}: {error}"
        ) from error
    _check(entry, where)
    return entry


def _check(entry: DatasetEntry, where: str) -> None:
    rotations = [RotationColumns(entry.rotation, entry.rotation_convention)]
    rotations += [entry.same_rotation] if entry.same_rotation else []
    fits = all(rotation_width(each.convention) == _width(each.columns) for each in rotations)
    if _width(entry.position) != 3 or not fits:
        raise ConfigError(
            "A registry entry's slices do not fit its conventions",
            where=where,
            found=f"position {entry.position}, rotations {rotations}",
            expected=f"3 numbers for position; for rotation 3 as euler_xyz_extrinsic etc., {ROTATION_WIDTH}",
        )
    choices: dict[str, tuple[str, tuple[str, ...]]] = {}
    choices["gripper_command.rule"] = (entry.gripper_rule, ("as_is", "binarize_backfill", "relative"))
    choices["format"] = (entry.format, ("rlds", "lerobot"))
    for name, (found, expected) in choices.items():
        if found not in expected:
            raise ConfigError(
                "A registry entry names something that there is not",
                where=f"{where}.{name}",
                found=found,
                expected=expected,
            )
    if not np.isclose(np.linalg.det(entry.base_matrix()), 1):
        raise ConfigError(
            "The axes of a base frame are no right-handed frame",
            where=f"{where}.base_axes",
            found=entry.base_axes,
            expected="like [-y, x, z]: our x, y, z in terms of the recorded ones",
        )


def _width(columns: Columns) -> int:
    return columns.stop - columns.start


def _optional(make: Any, value: Any) -> Any:
    return None if value is None else make(value)


def _camera(fields: dict[str, Any]) -> CameraEntry:
    return CameraEntry(**{**fields, "size": _optional(tuple, fields.get("size"))})


def _rotation(fields: dict[str, Any]) -> RotationColumns:
    options = dict(fields)
    convention = options.pop("convention")
    return RotationColumns(_columns(options), convention)


def _columns(fields: dict[str, Any]) -> Columns:
    options = dict(fields)
    start, stop = options.pop("slice")
    if "full" in options:
        options["scale"] = 1 / float(options.pop("full"))
    return Columns(start=int(start), stop=int(stop), **options)
