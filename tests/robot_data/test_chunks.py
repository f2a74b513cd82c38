"""Chunks against scipy on tracks with a closed form, and against a step-by-step reading of the definition."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation, Slerp

from spear_lightning.errors import ConfigError
from spear_lightning.geometry.poses import chunk_to_poses
from spear_lightning.robot_data.chunks import ChunkSpec, read_chunks
from spear_lightning.robot_data.episode_index import EpisodeIndex


def made_up_index(rate_hz: float, lengths: list[int], seed: int = 0) -> Any:
    """Return what `read_chunks` needs of an index, with random smooth tracks."""
    rng = np.random.default_rng(seed)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    poses = []
    for length in lengths:
        position = np.cumsum(rng.normal(0, 0.02, (length, 3)), axis=0)
        rotation = Rotation.from_rotvec(np.cumsum(rng.normal(0, 0.1, (length, 3)), axis=0)).as_quat()
        rotation *= np.where(rotation[:, 3:] < 0, -1, 1)
        poses.append(np.concatenate([position, rotation], axis=1))
    total = int(starts[-1])
    return SimpleNamespace(
        rate_hz=rate_hz,
        episode_starts=starts,
        pose=np.concatenate(poses).astype(np.float32),
        gripper_state=rng.uniform(size=total).astype(np.float32),
        gripper_command=rng.integers(0, 2, total).astype(np.float32),
        episode_of=lambda frames: np.searchsorted(starts, frames, side="right") - 1,
    )


def expected_chunk(index: Any, frame: int, spec: ChunkSpec) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return positions (H, 3), rotation targets and gripper of a chunk by scipy, one frame at a time."""
    episode = int(index.episode_of(np.array([frame]))[0])
    start, end = index.episode_starts[episode : episode + 2]
    times = np.arange(end - start) / index.rate_hz
    track = index.pose[start:end].astype(np.float64)
    now = (frame - start) / index.rate_hz
    wanted = np.minimum(now + np.arange(1, spec.horizon + 1) / spec.rate_hz, times[-1])
    position = np.stack([np.interp(wanted, times, track[:, axis]) for axis in range(3)], axis=1)
    rotations = Rotation.from_quat(track[:, 3:])
    rotation = Slerp(times, rotations)(wanted) if len(times) > 1 else rotations[[0] * spec.horizon]
    before = [max(step for step in range(len(times)) if times[step] < w - 1e-9 or step == 0) for w in wanted]
    gripper = index.gripper_command[start:end][np.maximum(before, frame - start)]
    anchor_position, anchor_rotation = track[frame - start, :3], rotations[frame - start]
    if spec.mode == "cumulative":
        return position - anchor_position, (anchor_rotation.inv() * rotation).as_quat(), gripper
    steps = np.diff(np.concatenate([anchor_position[None], position]), axis=0)
    previous = Rotation.concatenate([anchor_rotation, rotation[:-1]])
    return steps, (previous.inv() * rotation).as_quat(), gripper


@settings(deadline=None, max_examples=60)
@given(
    rate_hz=st.sampled_from([3.0, 5.0, 10.0, 12.5, 15.0, 20.0, 30.0]),
    mode=st.sampled_from(["cumulative", "per_step"]),
    seed=st.integers(0, 10_000),
)
def test_chunks_equal_scipy(rate_hz: float, mode: Literal["cumulative", "per_step"], seed: int) -> None:
    index = made_up_index(rate_hz, [12, 1, 31], seed)
    spec = ChunkSpec(horizon=5, rate_hz=5.0, mode=mode)
    frames = np.arange(len(index.pose))
    chunks = read_chunks(index, frames, spec)
    for frame in frames:
        position, rotation, gripper = expected_chunk(index, frame, spec)
        action = chunks.actions[frame].double().numpy()
        np.testing.assert_allclose(action[:, :3], position, atol=2e-6)
        turned = (Rotation.from_quat(action[:, 3:7]).inv() * Rotation.from_quat(rotation)).magnitude()
        assert turned.max() < 2e-6
        assert (action[:, 6] >= 0).all()
        np.testing.assert_array_equal(action[:, 7], gripper)


def test_mask_ends_with_the_episode() -> None:
    index = made_up_index(10.0, [8])
    mask = read_chunks(index, np.array([0, 3, 6, 7]), ChunkSpec(horizon=4, rate_hz=5.0)).mask
    # Targets lie 2, 4, 6, 8 frames ahead; the last frame is 7.
    assert mask.tolist() == [
        [True, True, True, False],
        [True, True, False, False],
        [False] * 4,
        [False] * 4,
    ]


def test_same_rate_reads_the_next_frames_exactly() -> None:
    index = made_up_index(5.0, [20])
    chunks = read_chunks(index, np.array([4]), ChunkSpec())
    reached = chunk_to_poses(chunks.state, chunks.actions, "cumulative")[0]
    np.testing.assert_allclose(reached, index.pose[5:10], atol=1e-6)
    assert chunks.actions[0, :, 7].tolist() == index.gripper_command[4:9].tolist()
    np.testing.assert_array_equal(chunks.state[0, :7], index.pose[4])
    assert float(chunks.state[0, 7]) == float(index.gripper_state[4])


def test_real_episodes_chunk_to_their_own_poses(demo_index: EpisodeIndex) -> None:
    frames = np.asarray(demo_index.samples)
    chunks = read_chunks(demo_index, frames, ChunkSpec(horizon=3))
    reached = chunk_to_poses(chunks.state, chunks.actions, "cumulative")
    for row, frame in enumerate(frames):
        valid = int(chunks.mask[row].sum())
        expected = torch.from_numpy(np.array(demo_index.pose[frame + 1 : frame + 1 + valid]))
        torch.testing.assert_close(reached[row, :valid], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("wrong", [{"horizon": 0}, {"rate_hz": 0.0}])
def test_impossible_chunks_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="at least one action"):
        ChunkSpec(**wrong)
