"""A tiny made-up data set in Bridge V2's layout, for the demo and the tests: a gripper reaches for a block.

The pictures are simple projections, but they show what decides the motion: where the block of the named colour
is and how it is turned, and where the gripper is.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import simplejpeg
import torch

from spear_lightning.geometry import quaternions
from spear_lightning.robot_data.rlds_writer import (
    STEP_ENDS,
    RldsLayout,
    jpeg,
    scalar,
    step_ends,
    text,
    vector,
    write_description,
    write_shard,
)

COLOURS = {"red": (200, 40, 40), "green": (40, 160, 60), "blue": (50, 70, 200)}
"""Colours of the blocks."""

TABLE_LOW_M, TABLE_HIGH_M = np.array([0.20, -0.15]), np.array([0.40, 0.15])
"""Where blocks lie, x and y in the robot's base frame."""

_BLOCK_M = 0.025
_STEPS_TO_REACH = 14


def bridge_layout(height: int, width: int) -> RldsLayout:
    """Return the part of Bridge V2's layout that the registry entry needs, with two cameras."""
    return RldsLayout(
        "bridge_dataset",
        "1.0.0",
        (
            jpeg("observation/image_0", height, width),
            jpeg("observation/image_1", height, width),
            vector("observation/state", 7),
            vector("action", 7),
            text("language_instruction"),
            *STEP_ENDS,
            scalar("episode_metadata/episode_id", "int32", per_step=False),
        ),
    )


def write_demo_episodes(
    root: Path, episodes: int = 48, steps: int = 20, height: int = 120, width: int = 160, seed: int = 0
) -> Path:
    """Write `root/bridge_dataset/1.0.0`.

    Args:
        root: The data root to be.
        episodes: Episodes, in shards of 16.
        steps: Steps of an episode at 5 Hz.
        height: Rows of the pictures.
        width: Columns of the pictures.
        seed: Of everything; two calls with one seed write the same bytes.

    Returns:
        The folder.
    """
    layout = bridge_layout(height, width)
    folder = root / layout.name / layout.version
    folder.mkdir(parents=True, exist_ok=True)
    shards = [range(start, min(start + 16, episodes)) for start in range(0, episodes, 16)]
    lengths = []
    for number, shard in enumerate(shards):
        payloads = [layout.serialize(demo_episode(layout, seed, episode, steps)) for episode in shard]
        lengths.append(write_shard(folder, layout, "train", number, len(shards), payloads))
    write_description(folder, layout, {"train": lengths}, "Made-up episodes: a gripper reaches for a block.")
    return folder


def demo_episode(
    layout: RldsLayout, seed: int, episode: int, steps: int
) -> dict[str, np.ndarray | list[bytes] | list[str]]:
    """Return one episode: reach for the block of the named colour, turning with it, and close the gripper."""
    rng = np.random.default_rng([seed, episode])
    names = list(rng.permutation(list(COLOURS))[:2])
    blocks = {str(name): rng.uniform(TABLE_LOW_M, TABLE_HIGH_M) for name in names}
    yaw = {name: rng.uniform(-0.7, 0.7) for name in blocks}
    goal_name = str(names[0])
    goal = np.array([*blocks[goal_name], 0.02])
    start = np.array([*rng.uniform(TABLE_LOW_M, TABLE_HIGH_M), rng.uniform(0.12, 0.18)])
    # Smooth start and stop: position and angle follow 3 s^2 - 2 s^3.
    time = np.clip(np.arange(steps) / _STEPS_TO_REACH, 0, 1)
    ease_T = 3 * time**2 - 2 * time**3
    position_T3 = start + ease_T[:, None] * (goal - start)
    euler_T3 = np.stack([np.zeros(steps), np.zeros(steps), ease_T * yaw[goal_name]], axis=1)
    closing_T = np.arange(steps) >= _STEPS_TO_REACH
    opening_T = np.concatenate([[1.0], 1.0 - 0.8 * closing_T[:-1]])
    state_T7 = np.concatenate([position_T3, euler_T3, opening_T[:, None]], axis=1).astype(np.float32)
    action_T7 = np.zeros_like(state_T7)
    action_T7[:-1, :6] = np.diff(state_T7[:, :6], axis=0)
    action_T7[:, 6] = 1.0 - closing_T
    height, width, _ = next(f.shape for f in layout.features if f.kind == "image")
    views = [_draw(state, blocks, yaw, height, width) for state in state_T7]
    return {
        "observation/image_0": [_encode(above) for above, _ in views],
        "observation/image_1": [_encode(side) for _, side in views],
        "observation/state": state_T7,
        "action": action_T7,
        "language_instruction": [f"reach for the {goal_name} block"] * steps,
        **step_ends(steps),
        "episode_metadata/episode_id": np.array([episode]),
    }


def _encode(image_HW3: np.ndarray) -> bytes:
    return simplejpeg.encode_jpeg(np.ascontiguousarray(image_HW3), quality=95, colorspace="RGB")


def _draw(
    state_7: np.ndarray, blocks: dict[str, np.ndarray], yaw: dict[str, float], height: int, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the scene from above and from the side, uint8 (height, width, 3)."""
    scale = 0.8 * min(height / 0.34, width / 0.44)
    row, column = np.mgrid[:height, :width] + 0.5
    along, across = (row - height / 2) / scale, (column - width / 2) / scale
    above = np.full((height, width, 3), (170, 150, 120), np.uint8)
    side = np.full((height, width, 3), (210, 215, 220), np.uint8)
    middle = (TABLE_LOW_M + TABLE_HIGH_M) / 2
    x, y, z = middle[0] - along, middle[1] + across, 0.12 - along
    side[z < 0] = (170, 150, 120)
    for name, place in blocks.items():
        above[_square(x - place[0], y - place[1], yaw[name], _BLOCK_M)] = COLOURS[name]
        side[(np.abs(y - place[1]) < _BLOCK_M) & (z > 0) & (z < 2 * _BLOCK_M)] = COLOURS[name]
    q = quaternions.from_euler_xyz_extrinsic(torch.from_numpy(state_7[3:6]).double())
    turned = float(quaternions.to_rotvec(q)[2])
    spread = 0.01 + 0.02 * float(state_7[6])
    for direction in (-1, 1):
        finger_x = x - state_7[0] + direction * spread * np.sin(turned)
        finger_y = y - state_7[1] - direction * spread * np.cos(turned)
        above[finger_x**2 + finger_y**2 < 0.008**2] = (20, 20, 20)
        bar = np.abs(y - state_7[1] - direction * spread) < 0.005
        side[bar & (z > state_7[2]) & (z < state_7[2] + 0.05)] = (20, 20, 20)
    return above, side


def _square(dx: np.ndarray, dy: np.ndarray, yaw: float, half: float) -> np.ndarray:
    along = dx * np.cos(yaw) + dy * np.sin(yaw)
    across = dy * np.cos(yaw) - dx * np.sin(yaw)
    return np.maximum(np.abs(along), np.abs(across)) < half
