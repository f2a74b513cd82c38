"""Gripper rules against their definitions, rotation conventions against scipy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from spear_lightning.errors import ConfigError
from spear_lightning.robot_data.canonical import absolute_from_relative, binarize_backfill, canonical_pose
from spear_lightning.robot_data.registry import parse_registry

ENTRY = """
schema: 1
datasets:
  robot:
    name: robot
    version: 1.0.0
    rate_hz: 10
    cameras: {{primary: {{key: image}}}}
    position: {{key: position, slice: [0, 3], scale: 0.001}}
    rotation: {{key: rotation, slice: [0, {width}], convention: {convention}}}
"""


@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=40))
def test_binarize_backfill_takes_the_next_decided_value(values: list[float]) -> None:
    result = binarize_backfill(np.array(values, np.float32))
    for step in range(len(values)):
        later = [v for v in values[step:] if v > 0.95 or v < 0.05]
        assert result[step] == float((later[0] if later else values[step]) > 0.5)


@given(st.lists(st.sampled_from([-1.0, 0.0, 0.05, 1.0]), min_size=1, max_size=30))
def test_relative_commands_hold_between_events(values: list[float]) -> None:
    result = absolute_from_relative(np.array(values, np.float32))
    events = [v for v in values if abs(v) > 0.1]
    opening = True if not events else events[0] < 0
    for step, value in enumerate(values):
        opening = value > 0 if abs(value) > 0.1 else opening
        assert result[step] == float(opening)


@pytest.mark.parametrize(
    "convention", ["euler_xyz_extrinsic", "quat_xyzw", "quat_wxyz", "rotvec", "matrix_colmajor"]
)
def test_rotation_conventions_equal_scipy(convention: str) -> None:
    rotation = Rotation.random(500, random_state=0)
    homogeneous = np.zeros((500, 4, 4))
    homogeneous[:, :3, :3], homogeneous[:, 3, 3] = rotation.as_matrix(), 1
    stored = {
        "euler_xyz_extrinsic": rotation.as_euler("xyz"),
        "quat_xyzw": 1.001 * rotation.as_quat(),
        "quat_wxyz": -rotation.as_quat(scalar_first=True),
        "rotvec": rotation.as_rotvec(),
        "matrix_colmajor": homogeneous.transpose(0, 2, 1).reshape(500, 16),
    }[convention].astype(np.float32)
    entry = parse_registry(ENTRY.format(width=stored.shape[1], convention=convention), "test")["robot"]
    position = np.random.default_rng(0).normal(size=(500, 3)).astype(np.float32)
    pose = canonical_pose(entry, {"position": position, "rotation": stored})
    np.testing.assert_allclose(pose[:, :3], position / 1000, rtol=1e-6)
    assert (Rotation.from_quat(pose[:, 3:]).inv() * rotation).magnitude().max() < 2e-6
    np.testing.assert_allclose(np.linalg.norm(pose[:, 3:], axis=1), 1, atol=1e-6)
    assert (pose[:, 6] >= 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("[0, 3], scale", "[0, 2], scale"), "3 numbers"),
        (("rate_hz: 10", ""), "rate_hz"),
        (("schema: 1", ""), "schema"),
    ],
)
def test_wrong_registry_entries_are_refused(change: tuple[str, str], message: str) -> None:
    text = ENTRY.format(width=3, convention="rotvec").replace(*change)
    with pytest.raises(ConfigError, match=message):
        parse_registry(text, "test")
