"""A data set's own conventions -> ours: pose [x m, q xyzw] in the base frame, gripper openness in [0, 1].

Labels are made from *measured* poses: stored actions differ in unit and meaning from set to set and are used
for the gripper alone (spec section 9).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch

from spear_lightning.errors import DataError
from spear_lightning.geometry import quaternions
from spear_lightning.robot_data.dataset_entry import EULER, Columns, DatasetEntry, RotationColumns

RELATIVE_EVENT = 0.1
"""Relative gripper commands beyond this mean an opening or closing; smaller ones mean "hold"."""

LARGEST_RELATIVE = 1.5

DECIDED_OPEN, DECIDED_CLOSED = 0.95, 0.05
"""Between these a gripper command is on its way, and takes the value it is on its way to."""


def canonical_pose(entry: DatasetEntry, streams: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return measured poses.

    Args:
        entry: The data set's conventions.
        streams: Step feature -> (T, n).

    Returns:
        float32 (T, 7): position in metres, unit quaternion xyzw with w >= 0, tool -> base.
    """
    position_T3 = columns_of(entry.position, streams)
    quaternion_T4 = rotation_of(RotationColumns(entry.rotation, entry.rotation_convention), streams)
    if entry.base_axes is not None:
        base_33 = entry.base_matrix()
        position_T3 = position_T3 @ base_33.T
        quaternion_T4 = quaternions.multiply(quaternions.from_matrix(torch.from_numpy(base_33)), quaternion_T4)
    quaternion_T4 = quaternions.canonicalize(quaternion_T4)
    return np.concatenate([position_T3, quaternion_T4.numpy()], axis=1).astype(np.float32)


def rotation_of(rotation: RotationColumns, streams: Mapping[str, np.ndarray]) -> torch.Tensor:
    """Return the rotations in some numbers: float64 (T, 4), xyzw of either sign, tool -> recorded base frame."""
    values_Tn = torch.from_numpy(columns_of(rotation.columns, streams))
    euler = EULER.fullmatch(rotation.convention)
    return from_euler(values_Tn, *euler.groups()) if euler else _ROTATIONS[rotation.convention](values_Tn)


def from_euler(angles_T3: torch.Tensor, axes: str, frame: str) -> torch.Tensor:
    """Convert Euler angles about any axes.

    Args:
        angles_T3: Radians, in the order of the axes.
        axes: E.g. "zxy": first about z.
        frame: "extrinsic": about axes that stay; "intrinsic": about axes turned by the angles before.

    Returns:
        (T, 4) unit quaternions of either sign.
    """
    turned = []
    for place, axis in enumerate(axes):
        rotvec_T3 = torch.zeros_like(angles_T3)
        rotvec_T3[:, "xyz".index(axis)] = angles_T3[:, place]
        turned.append(quaternions.from_rotvec(rotvec_T3))
    first, second, third = turned if frame == "intrinsic" else reversed(turned)
    return quaternions.multiply(quaternions.multiply(first, second), third)


def columns_of(columns: Columns, streams: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return float64 (T, n) of a step feature's numbers in our unit."""
    values = streams[columns.key][:, columns.start : columns.stop].astype(np.float64)
    return values * columns.scale + columns.offset


def gripper_state(entry: DatasetEntry, streams: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return the measured openness, float32 (T,) in [0, 1].

    A data set that does not measure it gets the command, one step late.
    """
    if entry.gripper_state is None:
        command_T = gripper_command(entry, streams)
        return np.concatenate([command_T[:1], command_T[:-1]])
    return np.clip(columns_of(entry.gripper_state, streams).mean(axis=1), 0, 1).astype(np.float32)


def gripper_command(entry: DatasetEntry, streams: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return the commanded openness, float32 (T,) in [0, 1]; the command of step t leads to step t + 1.

    A data set without commands gets the openness measured one step later.
    """
    if entry.gripper_command is None:
        if entry.gripper_state is None:
            return np.ones(len(streams[entry.position.key]), np.float32)
        state_T = gripper_state(entry, streams)
        return np.concatenate([state_T[1:], state_T[-1:]])
    command_T = columns_of(entry.gripper_command, streams)[:, 0].astype(np.float32)
    return _GRIPPER_RULES[entry.gripper_rule](command_T)


def _unit_xyzw(q: torch.Tensor) -> torch.Tensor:
    return q / torch.linalg.vector_norm(q, dim=-1, keepdim=True)


def binarize_backfill(command_T: np.ndarray) -> np.ndarray:
    """Make commands binary: values in between take the next decided value; a tail that never decides rounds."""
    decided_T = (command_T > DECIDED_OPEN) | (command_T < DECIDED_CLOSED)
    next_T = np.where(decided_T, np.arange(len(command_T)), len(command_T))
    next_T = np.minimum.accumulate(next_T[::-1])[::-1]
    padded = np.append((command_T > 0.5), False)
    tail_T = next_T == len(command_T)
    return np.where(tail_T, command_T > 0.5, padded[next_T]).astype(np.float32)


def absolute_from_relative(command_T: np.ndarray) -> np.ndarray:
    """Turn relative commands (positive opens) into the openness they lead to.

    Values within `RELATIVE_EVENT` of zero hold. Before the first event the gripper is in the state opposite to
    it, open if there is none.

    Raises:
        DataError: If a command is beyond 1: labels such as 0, 1, 2 would be misread.
    """
    if (np.abs(command_T) > LARGEST_RELATIVE).any():
        raise DataError(
            "Relative gripper commands are out of range",
            found=float(np.abs(command_T).max()),
            expected=f"opening 1, closing -1, holding 0, all within {LARGEST_RELATIVE}",
        )
    event_T = np.abs(command_T) > RELATIVE_EVENT
    if not event_T.any():
        return np.ones(len(command_T), np.float32)
    last_T = np.maximum.accumulate(np.where(event_T, np.arange(len(command_T)), -1))
    first_opens = command_T[int(np.argmax(event_T))] > 0
    return np.where(last_T < 0, not first_opens, command_T[last_T] > 0).astype(np.float32)


def clipped(command_T: np.ndarray) -> np.ndarray:
    """Clip to [0, 1]."""
    return np.clip(command_T, 0, 1)


_ROTATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "quat_xyzw": _unit_xyzw,
    "quat_wxyz": lambda q: quaternions.from_wxyz(_unit_xyzw(q)),
    "rotvec": quaternions.from_rotvec,
    "matrix_colmajor": lambda flat: quaternions.from_matrix_colmajor(flat)[0],
}
_GRIPPER_RULES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "as_is": clipped,
    "binarize_backfill": binarize_backfill,
    "relative": absolute_from_relative,
}
