"""Poses, chunks of relative poses, and interpolation between recorded poses.

A pose is a tensor (..., 7) [p, q]: position in metres in the robot's base frame, and the orientation of the
tool in that frame as a unit quaternion xyzw (see `geometry.quaternions`). A relative pose [dp, dq] has its
translation in the BASE frame and its rotation in the TOOL frame: dp = p - p0, dq = q0* q (spec section 9).
This is not the product of SE(3), whose translation would be in the tool frame.

Everything takes leading dimensions, so that data workers call it once per batch on `torch.from_numpy` views.

Shape letters: B batch, H horizon, T frames of an episode.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from spear_lightning.errors import ConfigError, ShapeError
from spear_lightning.geometry import quaternions

POSE_WIDTH = 7
"""Numbers in a pose: position 3, quaternion xyzw 4."""

ChunkMode = Literal["cumulative", "per_step"]
"""What the targets of a chunk are relative to: all to the current pose, or each to the one before."""


def relative_pose(reference: Tensor, target: Tensor) -> Tensor:
    """Return the target relative to the reference: translation in the base frame, rotation in the tool frame.

    Args:
        reference: (..., 7) poses.
        target: (..., 7) poses.

    Returns:
        (..., 7) [p - p0, q0* q], quaternions with w >= 0.
    """
    translation = target[..., :3] - reference[..., :3]
    rotation = quaternions.multiply(quaternions.conjugate(reference[..., 3:]), target[..., 3:])
    return torch.cat([translation, quaternions.canonicalize(rotation)], dim=-1)


def compose_relative(reference: Tensor, relative: Tensor) -> Tensor:
    """Apply relative poses to a reference: the inverse of `relative_pose`.

    Args:
        reference: (..., 7) poses.
        relative: (..., 7) relative poses.

    Returns:
        (..., 7) poses [p0 + dp, q0 dq], quaternions with w >= 0.
    """
    translation = reference[..., :3] + relative[..., :3]
    rotation = quaternions.multiply(reference[..., 3:], relative[..., 3:])
    return torch.cat([translation, quaternions.canonicalize(rotation)], dim=-1)


def build_chunk(current: Tensor, targets: Tensor, mode: ChunkMode) -> Tensor:
    """Turn the poses to be reached into a chunk of relative poses.

    Args:
        current: (..., 7) current poses.
        targets: (..., H, 7) poses to be reached.
        mode: "cumulative": target j relative to the current pose; "per_step": to target j - 1.

    Returns:
        (..., H, 7) relative poses, quaternions with w >= 0.

    Raises:
        ConfigError: If the mode is neither.
    """
    _check_mode(mode)
    reference = current.unsqueeze(-2)
    if mode == "per_step":
        reference = torch.cat([reference, targets[..., :-1, :]], dim=-2)
    return relative_pose(reference, targets)


def chunk_to_poses(state: Tensor, actions: Tensor, mode: ChunkMode) -> Tensor:
    """Turn a chunk of relative poses into the poses to be reached: the inverse of `build_chunk`.

    Args:
        state: (..., >= 7) current poses; numbers after the pose (a gripper) are ignored.
        actions: (..., H, >= 7) relative poses; numbers after the pose are ignored.
        mode: What the actions are relative to (see `build_chunk`).

    Returns:
        (..., H, 7) poses in the base frame, quaternions with w >= 0.

    Raises:
        ConfigError: If the mode is neither.
    """
    _check_mode(mode)
    current, relative = state[..., :POSE_WIDTH], actions[..., :POSE_WIDTH]
    if mode == "cumulative":
        return compose_relative(current.unsqueeze(-2), relative)
    poses = []
    for step in relative.unbind(-2):
        current = compose_relative(current, step)
        poses.append(current)
    return torch.stack(poses, dim=-2)


def interpolate_poses(before: Tensor, after: Tensor, weight: Tensor) -> Tensor:
    """Interpolate between bracketing poses: positions linearly, rotations by slerp along the shorter arc.

    Args:
        before: (..., 7) poses at weight 0.
        after: (..., 7) poses at weight 1; the sign of their quaternions does not matter.
        weight: (...) weights in [0, 1].

    Returns:
        (..., 7) poses, quaternions with w >= 0.
    """
    weight = weight.to(before.dtype)
    q0, q1 = before[..., 3:], after[..., 3:]
    opposite = (q0 * q1).sum(-1, keepdim=True) < 0
    rotation = quaternions.slerp(q0, torch.where(opposite, -q1, q1), weight)
    translation = torch.lerp(before[..., :3], after[..., :3], weight.unsqueeze(-1))
    return torch.cat([translation, quaternions.canonicalize(rotation)], dim=-1)


def interpolate_track(poses: Tensor, times: Tensor) -> Tensor:
    """Read a recorded track at fractional times; before its start and after its end it holds still.

    Args:
        poses: (T, 7) poses of consecutive frames, at least one.
        times: (...) times in frames: 0 is the first frame, T - 1 the last.

    Returns:
        (..., 7) poses, quaternions with w >= 0.

    Raises:
        ShapeError: If the track is empty or its poses are not seven numbers.
    """
    if poses.ndim != 2 or poses.shape[0] == 0 or poses.shape[1] != POSE_WIDTH:
        raise ShapeError(
            "A track is one row [p, q] for each of at least one frame",
            where="interpolate_track",
            found=tuple(poses.shape),
            expected="(T, 7) with T >= 1",
        )
    last = poses.shape[0] - 1
    times = times.clamp(0, last)
    before = times.floor().long()
    after = (before + 1).clamp(max=last)
    return interpolate_poses(poses[before], poses[after], times - before)


def _check_mode(mode: str) -> None:
    if mode not in get_args(ChunkMode):
        raise ConfigError(
            "Unknown chunk mode", where="chunk_mode", found=mode, expected=" or ".join(get_args(ChunkMode))
        )
