"""Action chunks at the policy's rate, made from measured poses at the data set's own rate (spec section 9).

Any native frame may start a chunk. Target j lies j / rate_hz seconds later: its position is interpolated
linearly, its rotation by slerp between the neighbouring frames, and its gripper is the last command before it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from spear_lightning.batches import STATE_WIDTH
from spear_lightning.errors import ConfigError
from spear_lightning.geometry.poses import ChunkMode, build_chunk, interpolate_poses
from spear_lightning.robot_data.episode_index import EpisodeIndex

SAME_FRAME = 1e-6
"""Target times this close to a frame, in frames, are at the frame: 3 / 5 * 5 is not quite 3."""


@dataclass(frozen=True)
class ChunkSpec:
    """What a chunk of actions is.

    Attributes:
        horizon: Actions in a chunk (SPEAR-1: 5).
        rate_hz: Their rate (SPEAR-1: 5 Hz).
        mode: "cumulative": every target relative to the current pose; "per_step": each relative to the one
            before it.
    """

    horizon: int = 5
    rate_hz: float = 5.0
    mode: ChunkMode = "cumulative"

    def __post_init__(self) -> None:
        if self.horizon < 1 or self.rate_hz <= 0:
            raise ConfigError(
                "A chunk needs at least one action and a positive rate",
                where="chunks",
                found=f"horizon {self.horizon}, rate_hz {self.rate_hz}",
            )


def frames_ahead(native_hz: float, spec: ChunkSpec) -> int:
    """Return how many whole frames must follow a frame for the first target to lie inside the episode."""
    return math.ceil(native_hz / spec.rate_hz - SAME_FRAME)


@dataclass
class Chunks:
    """Chunks of B frames (see `RobotBatch` for the meaning of the fields).

    Attributes:
        state: float32 (B, 8).
        actions: float32 (B, H, 8).
        mask: bool (B, H).
    """

    state: Tensor
    actions: Tensor
    mask: Tensor


def read_chunks(index: EpisodeIndex, frames_B: np.ndarray, spec: ChunkSpec) -> Chunks:
    """Read the states and chunks of frames of one data set.

    Args:
        index: The data set.
        frames_B: int64 (B,), frames that start a chunk.
        spec: What a chunk is.

    Returns:
        Chunks in physical units. Past the end of an episode the last pose is held and the mask is False.
    """
    last_B = index.episode_starts[index.episode_of(frames_B) + 1] - 1
    ahead_H = np.arange(1, spec.horizon + 1) * (index.rate_hz / spec.rate_hz)
    # Times are relative to the frame, so that they stay exact however large the data set.
    left_BH = (last_B - frames_B)[:, None]
    mask_BH = ahead_H <= left_BH + SAME_FRAME
    time_BH = np.minimum(ahead_H, left_BH)
    before_BH = np.floor(time_BH + SAME_FRAME).astype(np.int64)
    weight_BH = np.clip(time_BH - before_BH, 0, 1)
    weight_BH[weight_BH < SAME_FRAME] = 0
    after_BH = np.minimum(before_BH + (weight_BH > 0), left_BH)
    poses_BH7 = interpolate_poses(
        _gather(index.pose, frames_B[:, None] + before_BH),
        _gather(index.pose, frames_B[:, None] + after_BH),
        torch.from_numpy(weight_BH.astype(np.float32)),
    )
    pose_B7 = _gather(index.pose, frames_B)
    chunk_BH7 = build_chunk(pose_B7, poses_BH7, spec.mode)
    # The command of frame t acts from t to t + 1: the one in force just before the target's time.
    command_BH = np.maximum(np.ceil(time_BH - SAME_FRAME).astype(np.int64) - 1, 0)
    gripper_BH = _gather(index.gripper_command, frames_B[:, None] + command_BH)
    state_B8 = torch.cat([pose_B7, _gather(index.gripper_state, frames_B)[:, None]], dim=-1)
    actions_BH8 = torch.cat([chunk_BH7, gripper_BH[..., None]], dim=-1)
    assert actions_BH8.shape[-1] == STATE_WIDTH
    return Chunks(state_B8, actions_BH8, torch.from_numpy(mask_BH))


def _gather(rows: np.ndarray, frames: np.ndarray) -> Tensor:
    # Fancy indexing copies just these rows out of the memory map.
    return torch.from_numpy(np.asarray(rows[frames]))
