"""Entries of the data set registry: the conventions of each data set as checked, typed values."""

from __future__ import annotations

import difflib
import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml

from spear_lightning.errors import ConfigError

RotationConvention = Literal["euler_xyz_extrinsic", "quat_xyzw", "quat_wxyz", "rotvec", "matrix_colmajor"]
GripperRule = Literal["as_is", "binarize_backfill", "relative"]

ROTATION_WIDTH: dict[str, int] = {
    "euler_xyz_extrinsic": 3,
    "quat_xyzw": 4,
    "quat_wxyz": 4,
    "rotvec": 3,
    "matrix_colmajor": 16,
}
"""Numbers that each rotation convention takes."""


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
    """Where a camera's images are; an optional camera may hold dummy pictures in some episodes."""

    key: str
    optional: bool = False


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
    rotation_convention: RotationConvention
    gripper_state: Columns | None
    gripper_command: Columns | None
    gripper_rule: GripperRule
    instruction: tuple[str, ...]
    skip_first_steps: int = 0

    def required_keys(self) -> dict[str, int]:
        """Return step feature -> how many numbers it must have, for all that the poses are made of."""
        needed: dict[str, int] = {}
        for columns in (self.position, self.rotation, self.gripper_state, self.gripper_command):
            if columns is not None:
                needed[columns.key] = max(needed.get(columns.key, 0), columns.stop)
        return needed

    def fingerprint(self) -> str:
        """Return a short hash of the conventions: an index made under others is not used."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]


@cache
def registry() -> dict[str, DatasetEntry]:
    """Return the entries that ship with the package, by id."""
    text = resources.files("spear_lightning.robot_data").joinpath("oxe_registry.yaml").read_text()
    return parse_registry(text, "oxe_registry.yaml")


def entry_of(dataset: str) -> DatasetEntry:
    """Return a registry entry by id (e.g. "bridge").

    Raises:
        ConfigError: If there is none; names the nearest.
    """
    entries = registry()
    if dataset in entries:
        return entries[dataset]
    close = difflib.get_close_matches(dataset, entries, n=3)
    raise ConfigError(
        "The registry has no such data set",
        where="data.mixture",
        found=dataset,
        expected=f"one of {sorted(entries)}" + (f"; did you mean {close[0]}?" if close else ""),
    )


def entry_for_folder(folder: Path, name: str) -> DatasetEntry:
    """Return the registry entry whose data set name is that of an RLDS folder.

    Raises:
        ConfigError: If there is none.
    """
    for entry in registry().values():
        if entry.name == name:
            return entry
    raise ConfigError(
        "The registry has no data set of this name",
        where=folder,
        found=name,
        expected=f"one of {sorted(entry.name for entry in registry().values())}",
        remedy="say which conventions apply with --dataset ID",
    )


def parse_registry(text: str, where: str) -> dict[str, DatasetEntry]:
    """Parse registry YAML.

    Raises:
        ConfigError: If an entry lacks a field or has a wrong one.
    """
    content = yaml.safe_load(text)
    if not isinstance(content, dict) or content.get("schema") != 1:
        raise ConfigError("Not a data set registry", where=where, expected="schema: 1")
    return {key: _entry(key, dict(value), f"{where}: {key}") for key, value in content["datasets"].items()}


def _entry(dataset: str, fields: dict[str, Any], where: str) -> DatasetEntry:
    try:
        rotation = dict(fields["rotation"])
        convention = rotation.pop("convention")
        command = dict(fields.get("gripper_command") or {})
        rule = command.pop("rule", "as_is")
        entry = DatasetEntry(
            id=dataset,
            name=fields["name"],
            version=str(fields["version"]),
            rate_hz=float(fields["rate_hz"]),
            cameras={name: CameraEntry(**camera) for name, camera in fields["cameras"].items()},
            position=_columns(fields["position"]),
            rotation=_columns(rotation),
            rotation_convention=convention,
            gripper_state=_columns(fields["gripper_state"]) if fields.get("gripper_state") else None,
            gripper_command=_columns(command) if command else None,
            gripper_rule=rule,
            instruction=tuple(fields.get("instruction") or ()),
            skip_first_steps=int(fields.get("skip_first_steps", 0)),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            "A registry entry cannot be understood", where=where, found=f"{type(error).__name__}: {error}"
        ) from error
    width = entry.rotation.stop - entry.rotation.start
    if entry.position.stop - entry.position.start != 3 or width != ROTATION_WIDTH.get(convention):
        raise ConfigError(
            "A registry entry's slices do not fit its conventions",
            where=where,
            found=f"position {entry.position}, rotation {entry.rotation} as {convention}",
            expected=f"3 numbers for position; for rotation {ROTATION_WIDTH}",
        )
    return entry


def _columns(fields: dict[str, Any]) -> Columns:
    options = dict(fields)
    start, stop = options.pop("slice")
    return Columns(start=int(start), stop=int(stop), **options)
