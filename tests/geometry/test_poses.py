"""Relative poses, chunks and interpolation against scipy's rotations and hand-computed tracks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation, Slerp
from torch import Tensor

from spear_lightning.errors import ConfigError, ShapeError
from spear_lightning.geometry import poses, quaternions

MODES: list[Any] = ["cumulative", "per_step"]


def random_poses(*shape: int, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    position = torch.randn((*shape, 3), generator=random, dtype=torch.float64)
    return torch.cat([position, quaternions.random_unit(shape, random, dtype=torch.float64)], dim=-1)


def assert_same_rotation(ours: Tensor, scipy: Rotation) -> None:
    difference = scipy.inv() * Rotation.from_quat(ours.reshape(-1, 4).numpy())
    assert difference.magnitude().max() < 1e-9


def test_translation_is_in_the_base_frame_and_rotation_in_the_tool_frame() -> None:
    reference, target = random_poses(40), random_poses(40, seed=1)
    relative = poses.relative_pose(reference, target)
    r0, r1 = Rotation.from_quat(reference[:, 3:].numpy()), Rotation.from_quat(target[:, 3:].numpy())
    assert torch.equal(relative[:, :3], target[:, :3] - reference[:, :3])
    assert_same_rotation(relative[:, 3:], r0.inv() * r1)
    assert (relative[:, 6] >= 0).all()


def test_composition_undoes_the_relative_pose() -> None:
    reference, target = random_poses(40), random_poses(40, seed=1)
    again = poses.compose_relative(reference, poses.relative_pose(reference, target))
    torch.testing.assert_close(again[:, :3], target[:, :3])
    torch.testing.assert_close(again[:, 3:], quaternions.canonicalize(target[:, 3:]))


def test_chunks_hold_what_their_mode_says() -> None:
    current, targets = random_poses(4), random_poses(4, 5, seed=1)
    cumulative = poses.build_chunk(current, targets, "cumulative")
    per_step = poses.build_chunk(current, targets, "per_step")
    for sample in range(4):
        r0 = Rotation.from_quat(current[sample, 3:].numpy())
        track = Rotation.from_quat(targets[sample, :, 3:].numpy())
        assert_same_rotation(cumulative[sample, :, 3:], r0.inv() * track)
        assert_same_rotation(per_step[sample, 0, 3:], r0.inv() * track[0])
        assert_same_rotation(per_step[sample, 1:, 3:], track[:-1].inv() * track[1:])
    torch.testing.assert_close(per_step[..., :3].cumsum(-2), cumulative[..., :3])


@pytest.mark.parametrize("mode", MODES)
def test_chunks_turn_back_into_poses(mode: Any) -> None:
    current, targets = random_poses(3), random_poses(3, 5, seed=1)
    gripper = torch.full((3, 5, 1), 7.0, dtype=torch.float64)
    actions = torch.cat([poses.build_chunk(current, targets, mode), gripper], dim=-1)
    state = torch.cat([current, gripper[:, 0]], dim=-1)
    again = poses.chunk_to_poses(state, actions, mode)
    assert again.shape == (3, 5, 7)
    torch.testing.assert_close(again[..., :3], targets[..., :3])
    torch.testing.assert_close(again[..., 3:], quaternions.canonicalize(targets[..., 3:]))


@pytest.mark.parametrize("mode", MODES)
def test_standing_still_is_no_translation_and_the_identity(mode: Any) -> None:
    current = random_poses(2)
    chunk = poses.build_chunk(current, current[:, None].expand(2, 5, 7), mode)
    expected = torch.tensor([0.0, 0, 0, 0, 0, 0, 1], dtype=torch.float64).expand(2, 5, 7)
    torch.testing.assert_close(chunk, expected)


def test_an_unknown_mode_is_refused() -> None:
    wrong: Any = "relative"
    with pytest.raises(ConfigError, match="cumulative or per_step"):
        poses.build_chunk(random_poses(1), random_poses(1, 5), wrong)
    with pytest.raises(ConfigError, match="cumulative or per_step"):
        poses.chunk_to_poses(random_poses(1), random_poses(1, 5), wrong)


def test_interpolated_tracks_agree_with_scipy_whatever_the_signs() -> None:
    track = random_poses(20)
    times = np.linspace(0, 19, 77)
    slerp = Slerp(np.arange(20), Rotation.from_quat(track[:, 3:].numpy()))(times)
    ours = poses.interpolate_track(track, torch.from_numpy(times))
    assert_same_rotation(ours[:, 3:], slerp)
    for axis in range(3):
        expected = np.interp(times, np.arange(20), track[:, axis].numpy())
        np.testing.assert_allclose(ours[:, axis].numpy(), expected, atol=1e-12)
    track[::3, 3:] *= -1
    torch.testing.assert_close(poses.interpolate_track(track, torch.from_numpy(times)), ours)


def test_tracks_hold_still_beyond_their_ends() -> None:
    track = random_poses(4)
    times = torch.tensor([[-3.0, 0.0], [3.0, 8.5]], dtype=torch.float64)
    ours = poses.interpolate_track(track, times)
    expected = torch.cat([track[..., :3], quaternions.canonicalize(track[..., 3:])], dim=-1)[[0, 0, 3, 3]]
    torch.testing.assert_close(ours, expected.reshape(2, 2, 7))
    single = poses.interpolate_track(track[:1], times)
    torch.testing.assert_close(single, expected[0].expand(2, 2, 7))


def test_whole_frames_are_returned_as_recorded_and_types_kept() -> None:
    track = random_poses(6).float()
    ours = poses.interpolate_track(track, torch.arange(6))
    assert ours.dtype == torch.float32
    assert torch.equal(ours[:, :3], track[:, :3])
    assert quaternions.rotation_angle(ours[:, 3:], track[:, 3:]).max() < 1e-6


@pytest.mark.parametrize("shape", [(0, 7), (5, 8), (2, 5, 7)])
def test_a_malformed_track_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match="T >= 1"):
        poses.interpolate_track(torch.zeros(shape), torch.zeros(1))
